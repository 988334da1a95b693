"""Reads files of the reverse pass. Their metadata says what they belong to."""

from pathlib import Path

import torch
from torch import Tensor

from influence_cli.cache.unit_file import open_tensor_file


def read_saved(path: Path, metadata: dict[str, str]) -> dict[str, Tensor]:
    """All tensors of a file. Raises CacheError for other metadata, or where a byte changed."""
    with open_tensor_file(path) as file:
        tensors = file.read(list(file.entries))
        file.verify(tensors)
        if different := [
            name for name, text in metadata.items() if file.metadata.get(name) != text
        ]:
            raise ValueError(f"it belongs elsewhere: {', '.join(different)} differs")
    return tensors


def check_values(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for another shape, or for a number that is not finite."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {shape}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has numbers that are not finite")
