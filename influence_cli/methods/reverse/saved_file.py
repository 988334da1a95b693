"""Files of the reverse pass: each says what it belongs to, and detects every changed byte."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.cache.unit_file import open_tensor_file
from influence_cli.storage.safetensors_io import write_tensors

CHECKSUM = "crc32"  # of the metadata: over the other metadata and all tensors


def write_saved(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors with `metadata`, which says what they belong to. Raises OSError."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_tensors(path, tensors, metadata | {CHECKSUM: compute_checksum(tensors, metadata)})


def read_saved(path: Path, metadata: dict[str, str]) -> dict[str, Tensor]:
    """All tensors of a file. Raises CacheError for other metadata, or where a byte changed."""
    with open_tensor_file(path) as file:
        tensors = file.read(list(file.entries))
        stored = {name: text for name, text in file.metadata.items() if name != CHECKSUM}
        if file.metadata.get(CHECKSUM) != compute_checksum(tensors, stored):
            raise ValueError("its checksum differs from its content")
        if different := [name for name in metadata if stored.get(name) != metadata[name]]:
            raise ValueError(f"it belongs elsewhere: {', '.join(different)} differs")
    return tensors


def compute_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """CRC-32 over metadata, names, dtypes, shapes and numbers."""
    checksum = zlib.crc32(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        if value.numel():
            numbers = value.contiguous().view(-1).view(torch.uint8).numpy()
            checksum = zlib.crc32(numbers.data, checksum)
    return f"{checksum:08x}"


def check_values(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError for another shape, or for a number that is not finite."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(value.shape)}, expected {shape}")
    if not torch.isfinite(value).all():
        raise ValueError(f"{name} has numbers that are not finite")
