"""What a collate function may return: a tensor, tuple, list, dict or any mapping, nested as it likes."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def map_tensors(apply: Callable[[torch.Tensor], Any], batch: Any) -> Any:
    """A copy of `batch` with `apply` on every tensor in it; mappings, tuples, lists, named tuples and dataclasses keep their type."""
    if isinstance(batch, torch.Tensor):
        return apply(batch)
    if isinstance(batch, Mapping):
        result: Any = copy.copy(batch)
        for key in batch:
            result[key] = map_tensors(apply, batch[key])
        return result
    if isinstance(batch, tuple):
        parts = [map_tensors(apply, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list):
        return [map_tensors(apply, part) for part in batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(apply, getattr(batch, f.name)) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **fields)
    return batch


def to(batch: Any, device: torch.device, precision: torch.dtype | None) -> Any:
    """The batch on `device`, its floating-point tensors cast to `precision` (None: as they are)."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, precision if precision is not None and tensor.is_floating_point() else None)

    return map_tensors(move, batch)


def leaves(batch: Any) -> list[torch.Tensor]:
    """Every tensor of the batch, in the order in which `map_tensors` meets them."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, batch)
    return found
