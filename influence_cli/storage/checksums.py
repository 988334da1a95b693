"""Checksums of stored tensors: a CRC-32 for each tensor, a SHA-256 of the header that holds them,
and the SHA-256 that identifies a checkpoint.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.errors import CheckpointError
from influence_cli.storage.json_text import parse_json


def digest_tensors(path: Path) -> str:
    """sha256 of a safetensors file's tensors, with their names, dtypes and shapes.

    The metadata does not count: safetensors orders it at random, and a corrected learning rate
    changes no gradient.

    Raises CheckpointError for a file that was removed or damaged since its header was read.
    """
    try:
        with path.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"its header would have {length:,} bytes")
            head = parse_json(content.read(length))
            head.pop("__metadata__", None)
            digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
            while part := content.read(1 << 20):
                digest.update(part)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} can't be read: {error}",
            "it is damaged, or changed during this command; finished work is kept",
            "copy it again, and run the same command",
        ) from error
    return digest.hexdigest()


def digest_header(path: Path) -> str:
    """The start of the sha256 of a safetensors file's header, with its metadata."""
    with path.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        return hashlib.sha256(content.read(length)).hexdigest()[:16]


# ---------------------------------------------------------------- in the header of a file
CHECKSUMS = "influence-checksums"  # metadata: CRC-32 of each tensor, as JSON
HEADER_DIGEST = "influence-header"  # metadata: SHA-256 of the header, with zeros in its own place
BLANK = b"0" * 64


def checksum_of(value: Tensor) -> int:
    """CRC-32 of a tensor's bytes. It releases Python's lock, so other threads compute meanwhile."""
    if not value.numel():
        return 0
    return zlib.crc32(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def checksum_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata that `sealed_header` completes. `tensors`: on the CPU, in the file's order."""
    sums = {name: checksum_of(value) for name, value in tensors.items()}
    return {CHECKSUMS: json.dumps(sums, separators=(",", ":")), HEADER_DIGEST: BLANK.decode()}


def sealed_header(text: bytes) -> bytes:
    """The header with its own digest."""
    return text.replace(BLANK, hashlib.sha256(text).hexdigest().encode(), 1)


def read_checksums(text: bytes, metadata: Mapping[str, str]) -> dict[str, int] | None:
    """The CRC-32 of each tensor; None for a file that influence did not write.

    Raises ValueError for a header that was changed.
    """
    digest = metadata.get(HEADER_DIGEST)
    if digest is None:
        return None
    blank = text.replace(digest.encode(), BLANK, 1)
    if len(digest) != len(BLANK) or hashlib.sha256(blank).hexdigest() != digest:
        raise ValueError("its header differs from its checksum")
    sums: dict[str, int] = json.loads(metadata[CHECKSUMS])
    return sums


class ChangedTensor(ValueError):
    """A tensor that differs from its checksum."""


def compare_checksums(tensors: Mapping[str, Tensor], sums: Mapping[str, int]) -> None:
    """Raises ChangedTensor, and KeyError for a tensor without a checksum."""
    for name, value in tensors.items():
        if checksum_of(value) != sums[name]:
            raise ChangedTensor(f"{name} differs from its checksum")
