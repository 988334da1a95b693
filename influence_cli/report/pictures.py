"""Thumbnails: what image(example) returns, as the text of a data URL."""

import base64
import importlib.util
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from influence_cli.errors import DefinitionError, UsageProblem

if TYPE_CHECKING:
    from PIL.Image import Image

LARGEST_SIDE = 160  # pixels of a thumbnail
SMALL_SIDE = 48  # up to which every pixel is exact: PNG
QUALITY = 80  # of WebP
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
KINDS = "expected: a PIL image, or an array (H, W), (H, W, 1|3|4) or (1|3|4, H, W)"


def require_pillow(definition: str) -> None:
    """Raises UsageProblem without pillow."""
    if importlib.util.find_spec("PIL") is None:
        raise UsageProblem(
            f"image() in {definition} makes pictures, and they need pillow",
            "install it: pip install 'influence-cli[report]'",
        )


def encode_picture(image: Any, place: str) -> str:  # Any: what the user's function returned
    """`data:image/png;base64,...` of a thumbnail; empty for None.

    `place`: for error messages. Raises DefinitionError for what is no image.
    """
    if image is None:
        return ""
    picture = convert_image(image, place)
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file = io.BytesIO()
    if max(picture.size) <= SMALL_SIDE:
        picture.save(file, "PNG", optimize=True)
    else:
        picture.save(file, "WEBP", quality=QUALITY)
    content = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{'png' if max(picture.size) <= SMALL_SIDE else 'webp'};base64,{content}"


def convert_image(image: Any, place: str) -> "Image":  # Any: as in encode_picture
    """A PIL image of mode L, RGB or RGBA."""
    from PIL import Image

    if not isinstance(image, Image.Image):
        return Image.fromarray(convert_pixels(image, place))
    if not all(image.size):
        raise DefinitionError(f"{place} has no pixels", f"found: size {image.size}", KINDS)
    if image.mode in ("L", "RGB", "RGBA"):
        return image.copy()
    transparent = "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBa")
    if image.mode.startswith(("I", "F")):  # 16 bits or more: PIL would clip them
        return Image.fromarray(convert_pixels(np.asarray(image), place))
    return image.convert("RGBA" if transparent else "RGB")


def convert_pixels(image: Any, place: str) -> np.ndarray:  # Any: as in encode_picture
    """(H, W), (H, W, 3) or (H, W, 4) bytes. Floats are from 0 to 1, integers from 0 to 255."""
    pixels = read_array(image)
    kind = f"found: {type(image).__name__}, shape {pixels.shape}, {pixels.dtype}"
    # a tensor has its channels first, an array last, where both would fit
    may_be_first = pixels.ndim == 3 and pixels.shape[0] in CHANNELS
    if may_be_first and (hasattr(image, "detach") or pixels.shape[2] not in CHANNELS):
        pixels = np.moveaxis(pixels, 0, 2)
    is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in CHANNELS)
    if not is_image or not pixels.size or pixels.dtype.kind not in "buif":
        raise DefinitionError(f"{place} is no image", kind, KINDS)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == np.uint8:
        return np.ascontiguousarray(pixels)
    limit = 255 if pixels.dtype.kind in "ui" else 1
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= limit):  # NaN is no number from 0 to 1
        raise DefinitionError(
            f"the pixels of {place} are out of range",
            f"found: from {low:g} to {high:g}",
            "expected: floats from 0 to 1, or integers from 0 to 255; undo the normalisation",
        )
    return np.ascontiguousarray(np.round(pixels * (255 / limit)).astype(np.uint8))


def read_array(image: Any) -> np.ndarray:  # Any: as in encode_picture
    """A tensor or an array as an array; an empty one for what is neither."""
    try:
        if callable(detach := getattr(image, "detach", None)):  # of a torch tensor
            tensor = detach().cpu()
            image = tensor.float() if tensor.is_floating_point() else tensor  # NumPy has no bf16
        return np.asarray(image)
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0)
