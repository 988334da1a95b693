"""Numbers as they are stored and as they are read: whole, or in few bits with a float32 scale for each row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from influence_cli.gradients.form_ops import from_tensors
from influence_cli.gradients.forms import Form

SCALED = (
    torch.float16,
    torch.bfloat16,
    torch.int8,
)  # stored with a float32 scale per row, so that small gradients survive
STORE_EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
} | {torch.int8: 1 / 127}


def pack(name: str, value: Tensor, store: torch.dtype | None) -> dict[str, Tensor]:
    """A tensor as it is stored; half precisions with a float32 scale per row (the row's largest magnitude), int8 with a 127th of it."""
    if not value.is_floating_point():
        return {name: value}
    store = store or value.dtype
    if store not in SCALED:
        return {name: value.to(store)}
    rows = value.double().reshape(len(value), math.prod(value.shape[1:]))
    scale = rows.abs().amax(1) if rows.numel() else rows.new_ones(len(rows))
    scale = scale / 127 if store == torch.int8 else scale
    scale = torch.where(
        scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scale)
    ).float()
    rows = rows / scale[:, None]
    rows = rows.round_().clamp_(-127, 127) if store == torch.int8 else rows
    return {name: rows.to(store).reshape(value.shape), f"{name}.scale": scale}


def pack_side_by_side(
    name: str, values: Sequence[Tensor], store: torch.dtype | None
) -> dict[str, Tensor]:
    """Several (N, K) tensors as one, each with a scale of its own: read at once, and multiplied at once."""
    packed = [pack(name, value, store) for value in values]
    scale = f"{name}.scale"
    scales = (
        {scale: torch.stack([part[scale] for part in packed], dim=1)} if scale in packed[0] else {}
    )
    return {name: torch.cat([part[name] for part in packed], dim=1)} | scales


def as_stored(form: Form, store: torch.dtype) -> Form:
    """As it is read after it was written, in its own precision."""
    parts: dict[str, Tensor] = {}
    for part, value in form.tensors().items():
        packed = pack(part, value, store)
        kept = unpack(packed[part], packed.get(f"{part}.scale"))
        parts[part] = kept.to(value.dtype) if value.is_floating_point() else kept
    return from_tensors(form.kind, form.shape, parts)


def unpack(value: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse: float32, or float64 where that was stored."""
    if scale is None:
        return value
    return value.float() * scale.view(-1, *[1] * (value.ndim - 1))


def unpack_side_by_side(
    value: Tensor, scales: Tensor | None, places: Sequence[Sequence[int]]
) -> Tensor:
    """(N, sum of K); `places`: first and last of each of them in a row."""
    if scales is None:
        return value
    found = value.float()
    for (start, stop), scale in zip(places, scales.unbind(1), strict=True):
        found[:, start:stop] *= scale[:, None]
    return found
