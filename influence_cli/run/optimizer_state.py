"""Checkpoints and optimizer state that a recorded training saves."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, TrajectoryError, listed
from influence_cli.run.adapters import CONFIG, describe_adapter, is_peft_model, select_adapter
from influence_cli.run.checkpoint_loading import list_tensors, map_keys, open_weights
from influence_cli.run.checkpoints import (
    ADAPTER,
    Checkpoint,
    find_checkpoints,
    is_checkpoint,
    read_header,
)
from influence_cli.storage.atomic import describe_disk_error, write_bytes
from influence_cli.storage.safetensors_io import CODES, read_tensors, write_tensors


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints in checkpoints/ by rising step; possibly none."""
    place = folder / "checkpoints"
    has_any = place.is_dir() and any(is_checkpoint(path, strict=False) for path in place.iterdir())
    return find_checkpoints(folder, place) if has_any else []


def matches_parameters(checkpoint: Checkpoint, model: nn.Module) -> bool:
    """Whether the model's parameters equal the checkpoint's, bit by bit.

    Buffers do not count: a forward pass changes them.
    """
    file_keys = map_keys(read_header(checkpoint.files), model).file_keys
    values: dict[str, Tensor] = {}
    for file in checkpoint.files:
        with open_weights(file) as content:
            values |= content.read_compared(content.entries)
    return all(
        name in file_keys
        and values[file_keys[name]].dtype == own.dtype
        and torch.equal(values[file_keys[name]], own.detach().cpu())
        for name, own in model.named_parameters()
        if own.requires_grad or not checkpoint.is_adapter
    )


def save_checkpoint(
    path: Path, model: nn.Module, metadata: Mapping[str, str], buffers: Mapping[str, Tensor]
) -> None:
    """Saves the model's tensors as the file `path`; of a peft model the adapter alone, as files in
    a folder of that name without its suffix. A tied tensor has its first name. `buffers`: values
    that replace those of the model.
    """
    tensors = list_tensors(model)
    tensors |= {name: value for name, value in buffers.items() if name in tensors}
    if is_peft_model(model):
        folder = path.with_suffix("")
        with report_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(folder / CONFIG, describe_adapter(model).encode())
        path, tensors = folder / ADAPTER, select_adapter(model, tensors)
    first = {id(value): (key, value) for key, value in reversed(tensors.items())}
    write_state_file(path, dict(first.values()), metadata)


def write_state_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """A safetensors file and its folder. Raises TrajectoryError."""
    if unknown := [
        f"{name} ({value.dtype})" for name, value in tensors.items() if value.dtype not in CODES
    ]:
        raise TrajectoryError(
            f"{path.name} can't hold these tensors: {listed(unknown)}",
            "expected: dtypes of safetensors",
        )
    with report_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, tensors, metadata)


@contextmanager
def report_write_errors(path: Path) -> Iterator[None]:
    """Turns a full or read-only disk into a TrajectoryError about `path`."""
    try:
        yield
    except OSError as error:
        raise describe_write_error(path, error) from error


def describe_write_error(path: Path, error: OSError) -> TrajectoryError:
    return TrajectoryError(
        describe_disk_error(path, error, path.parent),
        "free some space, or record into another folder",
        "a resumed training starts at the newest checkpoint",
    )


# ---------------------------------------------------------------- optimizer state
def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Saves the optimizer's state as tensors `STATE/PARAMETER NAME`. The metadata lists those that
    are Python numbers."""
    state = {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None
    }
    strange = {
        key.partition("/")[0]
        for key, value in state.items()
        if not isinstance(value, Tensor | int | float)
    }
    if strange:
        raise TrajectoryError(
            f"the state of {optimizer_name(optimizer)} can't be saved",
            f"found: {listed(sorted(strange))}; expected: tensors and numbers",
            "leave save_optimizer out",
        )
    numbers = {
        key: torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)
        for key, value in state.items()
        if not isinstance(value, Tensor)
    }
    write_state_file(
        path,
        state | numbers,
        {
            "optimizer": optimizer_name(optimizer),
            "numbers": json.dumps(sorted(numbers), separators=(",", ":")),
        },
    )


def state_path(folder: Path, step: int) -> Path:
    return folder / "optimizer" / checkpoint_name(step)


@dataclass(frozen=True)
class SavedState:
    """The optimizer's state at a step. `files`: its file; none where no state was saved."""

    step: int
    files: tuple[Path, ...]
    base: str = ""


def find_state(folder: Path, step: int) -> SavedState:
    """Raises TrajectoryError for a file without a valid header."""
    path = state_path(folder, step)
    if not path.is_file():
        return SavedState(step, ())
    read_metadata(path)
    return SavedState(step, (path,))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a saved state. Raises TrajectoryError."""
    try:
        return read_header((path,)).metadata
    except CheckpointError as error:
        raise TrajectoryError(
            f"optimizer/{path.name} can't be read: {error.headline}", *error.details
        ) from error


def read_state(path: Path, optimizer: str) -> dict[str, dict[str, Any]]:
    """The state of each parameter, by torch's names. Raises TrajectoryError where the file is of
    another optimizer."""
    metadata = read_metadata(path)
    try:
        tensors = read_tensors(path)
    except (OSError, ValueError) as error:
        raise TrajectoryError(
            f"optimizer/{path.name} can't be read: {error}", "copy it again, or delete it"
        ) from error
    if metadata.get("optimizer") != optimizer:
        raise TrajectoryError(
            f"{path} is of another optimizer: {metadata.get('optimizer', 'it names none')}",
            f"expected: {optimizer}",
        )
    numbers = json.loads(metadata["numbers"])
    state: dict[str, dict[str, Any]] = {}  # Any: tensors and numbers
    for label, value in tensors.items():
        key, _, name = label.partition("/")
        state.setdefault(name, {})[key] = value.item() if label in numbers else value
    return state


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = map_parameter_names(model)
    places = {
        names.get(id(own)): place
        for place, own in enumerate(
            own for group in optimizer.param_groups for own in group["params"]
        )
    }
    saved = read_state(path, optimizer_name(optimizer))
    if unknown := [name for name in saved if name not in places]:
        raise TrajectoryError(
            f"{path} is of another optimizer: it has the state of {listed(unknown)}"
        )
    state = {places[name]: values for name, values in saved.items()}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def map_parameter_names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__.lower()
