"""Batches as a collate function returns them: tensors in nested tuples, lists, mappings and
dataclasses.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Batch = Any  # whatever the user's collate function returns


def map_tensors(apply: Callable[[torch.Tensor], Any], batch: Batch) -> Batch:
    """A copy of `batch` with `apply` on every tensor in it; mappings, tuples, lists, named tuples
    and dataclasses keep their type.
    """
    if isinstance(batch, torch.Tensor):
        return apply(batch)
    if isinstance(batch, Mapping):
        mapped = {key: map_tensors(apply, value) for key, value in batch.items()}
        # keep another type of mapping (OrderedDict, a tokenizer's BatchEncoding) if it can be built
        # from a dict
        try:
            return type(batch)(mapped)  # type: ignore[call-arg]  # most mappings accept it
        except TypeError:
            return mapped
    if isinstance(batch, tuple):
        parts = [map_tensors(apply, part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list):
        return [map_tensors(apply, part) for part in batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {
            f.name: map_tensors(apply, getattr(batch, f.name))
            for f in dataclasses.fields(batch)
            if f.init
        }
        return dataclasses.replace(batch, **fields)
    return batch


def to(batch: Batch, device: torch.device, precision: torch.dtype | None) -> Batch:
    """The batch on `device`, with floating-point tensors in `precision` (None: unchanged). A copy
    to a CUDA device is not waited for.
    """

    def move(tensor: torch.Tensor) -> torch.Tensor:
        dtype = precision if precision is not None and tensor.is_floating_point() else None
        if device.type != "cuda" or not tensor.is_cpu or tensor.layout != torch.strided:
            return tensor.to(device, dtype)
        return tensor.pin_memory().to(device, dtype, non_blocking=True)

    return map_tensors(move, batch)


def leaves(batch: Batch) -> list[torch.Tensor]:
    """Every tensor of the batch, in the order in which `map_tensors` meets them."""
    tensors: list[torch.Tensor] = []

    def collect(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return tensors


def without_tensors(batch: Batch) -> Batch:
    """The batch with None in place of each tensor, to compare the other contents of two batches."""
    return map_tensors(lambda tensor: None, batch)


def unlike_examples(
    tensors: Sequence[torch.Tensor], batched: Sequence[bool], size: int
) -> torch.Tensor:
    """Positions of two examples of a batch, of one in a batch of one: the one with the fewest and
    the one with the most numbers other than 0 in tensors of whole numbers, such as tokens and
    masks.
    """
    counts = torch.zeros(size, dtype=torch.int64)
    for tensor, has_examples in zip(tensors, batched, strict=True):
        if has_examples and not (tensor.is_floating_point() or tensor.is_complex()):
            counts += tensor.reshape(size, -1).count_nonzero(1).cpu()
    at = torch.stack([counts.argmin(), counts.argmax()])
    if at[0] == at[1]:
        at = torch.arange(min(2, size))
    return at.to(tensors[0].device) if tensors else at


def counts_examples(tensor: torch.Tensor, size: int) -> bool:
    """Whether the first axis has the length `size`."""
    return tensor.ndim > 0 and len(tensor) == size
