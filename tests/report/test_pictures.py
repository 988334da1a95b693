"""Thumbnails of what image(example) returns."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from influence_cli.errors import DefinitionError
from influence_cli.report.pictures import encode_picture

GREY = np.arange(15, dtype=np.uint8).reshape(3, 5) * 16
COLOUR = np.arange(60, dtype=np.uint8).reshape(4, 5, 3) * 4


def decode(url: str) -> np.ndarray:
    kind, _, content = url.partition(";base64,")
    assert kind in ("data:image/png", "data:image/webp")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))))


@pytest.mark.parametrize(
    "image",
    [
        GREY,
        GREY[:, :, None],
        GREY[None],
        GREY / 255,
        GREY.astype(np.int64),
        torch.from_numpy(GREY),
        torch.from_numpy(GREY.copy()).int(),
        torch.from_numpy(GREY / 255).float()[None],
        torch.from_numpy(GREY / 255).float().requires_grad_(),
        Image.fromarray(GREY),
        GREY.tolist(),
        Image.fromarray(GREY.astype(np.int32)),
    ],
    ids=range(12),
)  # fmt: skip
def test_a_grey_picture_keeps_every_pixel(image):
    assert np.array_equal(decode(encode_picture(image, "image()")), GREY)


@pytest.mark.parametrize(
    "image",
    [
        COLOUR,
        COLOUR.transpose(2, 0, 1),
        torch.from_numpy(COLOUR.transpose(2, 0, 1).copy()) / 255,
        Image.fromarray(COLOUR),
    ],
    ids=["HWC", "CHW", "floats", "PIL"],
)
def test_a_colour_picture_keeps_every_pixel(image):
    assert np.array_equal(decode(encode_picture(image, "image()")), COLOUR)


def test_a_tensor_has_its_channels_first_and_an_array_last():
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert np.array_equal(decode(encode_picture(pixels, "image()")), pixels)
    tensor = torch.from_numpy(pixels)
    assert np.array_equal(decode(encode_picture(tensor, "image()")), pixels.transpose(1, 2, 0))


def test_black_and_white_pixels_are_0_and_255():
    pixels = np.array([[True, False], [False, True]])
    assert decode(encode_picture(pixels, "image()")).tolist() == [[255, 0], [0, 255]]


def test_a_large_picture_becomes_a_small_webp():
    pixels = np.random.default_rng(0).integers(0, 255, (400, 800, 3), np.uint8)
    url = encode_picture(pixels, "image()")
    assert url.startswith("data:image/webp") and len(url) < 30_000
    assert decode(url).shape == (80, 160, 3)


def test_an_example_may_have_no_picture():
    assert encode_picture(None, "image()") == ""


def test_the_users_picture_is_left_alone():
    image = Image.new("RGB", (400, 400))
    encode_picture(image, "image()")
    assert image.size == (400, 400)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((2, 3, 5)), "image() is no image"),
        (np.zeros(9), "image() is no image"),
        (np.zeros((0, 4)), "image() is no image"),
        ("a text", "image() is no image"),
        (object(), "image() is no image"),
        (Image.new("L", (0, 3)), "image() has no pixels"),
        (np.full((2, 2), 1.5), "the pixels of image() are out of range"),
        (np.full((2, 2), np.nan), "the pixels of image() are out of range"),
        (np.full((2, 2), 256), "the pixels of image() are out of range"),
        (torch.full((2, 2), -1), "the pixels of image() are out of range"),
    ],
    ids=range(10),
)
def test_what_is_no_picture_is_refused(image, message):
    with pytest.raises(DefinitionError) as raised:
        encode_picture(image, "image()")
    assert raised.value.headline == message
