"""Writes converted files. A file that exists already stays: it must be the same."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.errors import CheckpointError, InfluenceError, UsageProblem, listed
from influence_cli.storage.atomic import (
    describe_disk_error,
    remove_stale_siblings,
    write_bytes,
)
from influence_cli.storage.checksums import CHECKSUMS, HEADER_DIGEST
from influence_cli.storage.safetensors_io import TensorFile, write_tensors


def write_once(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bool:
    """Writes a safetensors file; False where the same file is there already.

    Raises CheckpointError for a file there with other content.
    """
    if path.exists():
        if differences := list_differences(path, tensors, metadata):
            raise CheckpointError(
                f"{path} is there already, with other content",
                *differences[:8],
                "name another place for TO, or delete that file",
            )
        return False
    make_folder_of(path)
    try:
        remove_stale_siblings(path)
        write_tensors(path, tensors, metadata)
    except OSError as error:
        raise InfluenceError(
            describe_disk_error(path, error, path.parent),
            "free some space and run the same command: finished files are kept",
        ) from error
    return True


def copy_once(source: Path, path: Path) -> None:
    """Copies a small file. Raises CheckpointError where another one is there."""
    content = source.read_bytes()
    if path.exists():
        if path.read_bytes() != content:
            raise CheckpointError(
                f"{path} is there already, with other content than {source}",
                "name another place for TO, or delete that file",
            )
        return
    make_folder_of(path)
    write_bytes(path, content)


def make_folder_of(path: Path) -> None:
    """Makes the folder of a file. Raises UsageProblem where a file has its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wrong_name = isinstance(error, FileExistsError | NotADirectoryError)
        raise (UsageProblem if wrong_name else InfluenceError)(
            describe_disk_error(path, error), f"expected: {path.parent} is a folder, or can be made"
        ) from error


def list_differences(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> list[str]:
    """Lines on what differs between a file and what would be written; none where nothing does."""
    try:
        with TensorFile(path) as file:
            own = {
                key: text
                for key, text in file.metadata.items()
                if key not in (CHECKSUMS, HEADER_DIGEST)
            }
            lines = [
                f"{key}: {own.get(key, 'none')} in the file, {metadata.get(key, 'none')} now"
                for key in sorted(own.keys() | metadata.keys())
                if own.get(key) != metadata.get(key)
            ]
            if odd := sorted(file.entries.keys() ^ tensors.keys()):
                return [*lines, f"other tensors: {listed(odd)}"]
            changed = [name for name in tensors if not is_same(file, name, tensors[name])]
    except (OSError, ValueError) as error:
        return [f"it can't be read: {error}"]
    return [*lines, f"other values: {listed(changed)}"] if changed else lines


def is_same(file: TensorFile, name: str, value: Tensor) -> bool:
    """Whether a tensor of a file equals another, bit by bit."""
    entry = file.entries[name]
    if entry.dtype != value.dtype or entry.shape != tuple(value.shape):
        return False
    stored = file.read_compared([name])[name]
    return torch.equal(as_bytes(stored), as_bytes(value))


def as_bytes(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8)
