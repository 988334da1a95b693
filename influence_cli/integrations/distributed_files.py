"""Reads folders of torch.distributed.checkpoint: `.metadata`, and shards `*.distcp`.

torch reads `.metadata` with a plain pickle, which can run code. This module reads it with an
unpickler that knows only the classes of such metadata, and then gives it to torch's reader.
"""

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import CheckpointError, listed
from influence_cli.integrations.saved_weights import OPTIMIZERS, RATES, SCHEDULERS, STEPS

METADATA = ".metadata"
CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}  # fmt: skip
PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
NUMBERS = {*STEPS, *RATES, "epoch", "param_groups", "_last_lr"}  # entries read beside the weights
LARGEST_NUMBER = 1 << 20  # bytes of such an entry


class MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of torch.distributed.checkpoint's metadata, and no other."""

    def find_class(self, module: str, name: str) -> Any:  # Any: a class or a function of torch
        if name in CLASSES.get(module, ()):
            import importlib

            return getattr(importlib.import_module(module), name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if module.partition(".")[0] == "pathlib" and name in PATHS:
            return join_parts
        raise pickle.UnpicklingError(f"class {module}.{name}")


def join_parts(*parts: object) -> str:
    """The folder in which the checkpoint was saved: a text here."""
    return "/".join(map(str, parts))


def is_distributed(folder: Path) -> bool:
    return (folder / METADATA).is_file()


def read_metadata(folder: Path) -> Any:  # Any: torch's Metadata
    """The checked metadata of a checkpoint.

    Raises CheckpointError for a class that such metadata does not have, and for damaged files.
    """
    path = folder / METADATA
    try:
        with path.open("rb") as file:
            metadata = MetadataUnpickler(file).load()
    except pickle.UnpicklingError as error:
        if str(error).startswith("class "):
            raise CheckpointError(
                f"{path} names a class that no metadata of torch.distributed.checkpoint has",
                f"found: {str(error).removeprefix('class ')[:200]}",
                "nothing of it was imported or run; another program wrote or changed this file",
            ) from error
        raise describe_broken_folder(folder, error) from error
    except Exception as error:  # a hostile pickle raises what it likes
        raise describe_broken_folder(folder, error) from error
    check_metadata(folder, metadata)
    return metadata


def check_metadata(folder: Path, metadata: Any) -> None:  # Any: as it was read
    """Raises CheckpointError for metadata of another shape, or of files outside the folder."""
    from torch.distributed.checkpoint.metadata import Metadata

    entries = getattr(metadata, "state_dict_metadata", None)
    storage = getattr(metadata, "storage_data", None)
    if type(metadata) is not Metadata or not isinstance(entries, dict) or type(storage) is not dict:
        raise describe_broken_folder(folder, ValueError("it holds no table of tensors"))
    names = {str(getattr(info, "relative_path", None)) for info in storage.values()}
    outside = sorted(name for name in names if Path(name).name != name)
    if outside:
        raise CheckpointError(
            f"{folder / METADATA} names files outside its folder",
            f"found: {listed(outside)}",
            "convert only checkpoints that you trust",
        )
    absent = sorted(name for name in names if not (folder / name).is_file())
    if absent:
        raise CheckpointError(
            f"{folder} lacks shards that its {METADATA} names",
            f"missing: {listed(absent)}",
            "copy the shards of all ranks into one folder",
        )


def describe_broken_folder(folder: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{folder} can't be read as a checkpoint of torch.distributed.checkpoint",
        f"found: {type(error).__name__} {str(error)[:300]}",
        "copy it again",
    )


def read_distributed(folder: Path) -> dict[str, Any]:  # Any: nested dicts, tensors, numbers
    """The weights, step and learning rate of a checkpoint, as the dict that was saved. The tensors
    of its optimizer are not read. Raises CheckpointError."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    metadata = read_metadata(folder)
    plan = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    paths = {name: as_path(plan.get(name), name) for name in metadata.state_dict_metadata}
    skipped = {*SCHEDULERS, *OPTIMIZERS}
    content: dict[str, Any] = {}  # Any: as above
    try:
        tensors = {
            name: torch.empty(entry.size, dtype=entry.properties.dtype)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not skipped & set(paths[name][:2])
        }
        load_tensors(folder, metadata, tensors)
        for name, value in (*tensors.items(), *read_numbers(folder, metadata, paths).items()):
            set_nested(content, paths[name], value)
    except Exception as error:  # torch raises many kinds for damaged shards
        raise describe_broken_folder(folder, error) from error
    return content


def as_path(path: object, name: str) -> tuple[Any, ...]:  # Any: keys of dicts, numbers in lists
    return tuple(path) if isinstance(path, list | tuple) and path else (name,)


def load_tensors(
    folder: Path,
    metadata: Any,  # Any: torch's Metadata
    tensors: dict[str, Tensor],
) -> None:
    """Fills tensors from the shards."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.api import CheckpointException

    class CheckedReader(FileSystemReader):
        def read_metadata(self, *arguments: Any, **options: Any) -> Any:  # Any: torch's signature
            return metadata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        try:
            load(tensors, storage_reader=CheckedReader(folder))
        except CheckpointException as error:  # no Exception: it wraps those of all ranks
            causes = [str(cause) for cause, _ in error.failures.values()]
            raise ValueError(causes[0] if causes else str(error)) from error


def read_numbers(
    folder: Path,
    metadata: Any,  # Any: torch's Metadata
    paths: Mapping[str, tuple[Any, ...]],
) -> dict[str, Any]:  # Any: numbers, and parameter groups
    """The entries that hold the step, the epoch and learning rates. What needs more than
    weights_only is left out."""
    numbers = {}
    for index, info in metadata.storage_data.items():
        path = paths.get(index.fqn, ())
        if not path or path[-1] not in NUMBERS or "state" in path or info.length > LARGEST_NUMBER:
            continue
        with (folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            content = file.read(info.length)
        try:
            numbers[index.fqn] = torch.load(
                io.BytesIO(content), map_location="cpu", weights_only=True
            )
        except pickle.UnpicklingError:  # an object of another class: no number
            continue
    return numbers


def set_nested(content: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:  # Any: as above
    """Puts a value at a path of keys. Lists become dicts by position."""
    for key in path[:-1]:
        content = content.setdefault(key, {})
    content[path[-1]] = value
