"""Number formats of the cache: plain, or few bits with a float32 scale per row."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from influence_cli.gradients.form_ops import from_tensors
from influence_cli.gradients.forms import Form

# stored with a float32 scale per row, so that small gradients do not underflow
SCALED = (torch.float16, torch.bfloat16, torch.int8)
STORE_EPS = {
    dtype: torch.finfo(dtype).eps
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
} | {torch.int8: 1 / 127}


def pack(name: str, value: Tensor, storage_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A tensor as it is stored, and its scale: per row the largest magnitude; for int8 a 127th."""
    if not value.is_floating_point():
        return {name: value}
    storage_dtype = storage_dtype or value.dtype
    if storage_dtype not in SCALED:
        return {name: value.to(storage_dtype)}
    rows = value.double().reshape(len(value), math.prod(value.shape[1:]))
    scale = rows.abs().amax(1) if rows.numel() else rows.new_ones(len(rows))
    scale = scale / 127 if storage_dtype == torch.int8 else scale
    scale = torch.where(
        scale > 0, scale.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(scale)
    ).float()
    rows = rows / scale[:, None]
    rows = rows.round_().clamp_(-127, 127) if storage_dtype == torch.int8 else rows
    return {name: rows.to(storage_dtype).reshape(value.shape), f"{name}.scale": scale}


def pack_side_by_side(
    name: str, values: Sequence[Tensor], storage_dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Several (N, K) tensors as one, each with its own scale: one read and one product."""
    packed = [pack(name, value, storage_dtype) for value in values]
    scale = f"{name}.scale"
    scales = (
        {scale: torch.stack([part[scale] for part in packed], dim=1)} if scale in packed[0] else {}
    )
    return {name: torch.cat([part[name] for part in packed], dim=1)} | scales


def as_stored(form: Form, storage_dtype: torch.dtype) -> Form:
    """The form as a write and a read would return it, in its own precision."""
    parts: dict[str, Tensor] = {}
    for part, value in form.tensors().items():
        packed = pack(part, value, storage_dtype)
        stored = unpack(packed[part], packed.get(f"{part}.scale"))
        parts[part] = stored.to(value.dtype) if value.is_floating_point() else stored
    return from_tensors(form.kind, form.shape, parts)


def unpack(value: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse of `pack`: float32, or float64 where that was stored."""
    if scale is None:
        return value
    return value.float() * scale.view(-1, *[1] * (value.ndim - 1))


def unpack_side_by_side(
    value: Tensor, scales: Tensor | None, places: Sequence[Sequence[int]]
) -> Tensor:
    """The inverse of `pack_side_by_side`, still one (N, sum of K) tensor.

    `places`: start and stop of each original tensor in a row.
    """
    if scales is None:
        return value
    values = value.float()
    for (start, stop), scale in zip(places, scales.unbind(1), strict=True):
        values[:, start:stop] *= scale[:, None]
    return values
