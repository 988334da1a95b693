"""What a recorded training leaves on the disk beside its lines: checkpoints and optimizer state, each whole or not at all."""

import contextlib
import errno
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, TrajectoryError, listed
from influence_cli.run import checkpoints
from influence_cli.run.checkpoints import DTYPES, Checkpoint

CODES = {dtype: code for code, dtype in DTYPES.items()}


def file_name(step: int) -> str:
    return f"step-{step:06d}.safetensors"


def checkpoints_in(folder: Path) -> list[Checkpoint]:
    """Those in checkpoints/ by rising step; there may be none."""
    place = folder / "checkpoints"
    there = place.is_dir() and any(
        checkpoints.is_checkpoint(path, strict=False) for path in place.iterdir()
    )
    return checkpoints.find(folder, place) if there else []


def holds(checkpoint: Checkpoint, model: nn.Module) -> bool:
    """Whether the model's parameters are the checkpoint's, bit by bit. Not its buffers: a forward pass changes them."""
    mapping, _, _ = checkpoints.key_map(checkpoints.headers(checkpoint.files), model)
    values = {key: value for file in checkpoint.files for key, value in load_file(file).items()}
    return all(
        name in mapping
        and values[mapping[name]].dtype == own.dtype
        and torch.equal(values[mapping[name]], own.detach().cpu())
        for name, own in model.named_parameters()
    )


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file. The library's own writer orders metadata at random; a resumed training shall leave the same bytes."""
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # wide numbers first: each then lies aligned
    if unknown := [
        f"{name} ({tensors[name].dtype})" for name in names if tensors[name].dtype not in CODES
    ]:
        raise TrajectoryError(f"tensors of a kind that a checkpoint can't hold: {listed(unknown)}")
    head: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        begin, end = end, end + tensors[name].numel() * tensors[name].element_size()
        head[name] = {
            "dtype": CODES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    values = (
        tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        for name in names
        if tensors[name].numel()
    )
    replace(path, itertools.chain([len(text).to_bytes(8, "little"), text], values))


def replace(path: Path, pieces: Iterable[Any]) -> None:
    """A file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> TrajectoryError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return TrajectoryError(
        f"{path} can't be written: {'the disk is full' if full else error.strerror}",
        "free some space, or record into another folder; a resume goes on from the newest checkpoint",
    )


# ---------------------------------------------------------------- optimizer state
def save_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's state as tensors `STATE/PARAMETER NAME`; the metadata names those that are Python's numbers."""
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
            f"{name_of(optimizer)} keeps {listed(sorted(strange))}, neither tensor nor number",
            "leave save_optimizer out",
        )
    numbers = {
        key: torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)
        for key, value in state.items()
        if not isinstance(value, Tensor)
    }
    write(
        path,
        state | numbers,
        {
            "optimizer": name_of(optimizer),
            "numbers": json.dumps(sorted(numbers), separators=(",", ":")),
        },
    )


def state_file(folder: Path, step: int) -> Path:
    return folder / "optimizer" / file_name(step)


def read_state(path: Path, optimizer: str) -> dict[str, dict[str, Any]]:
    """Per parameter its state, by torch's names of it. Raises TrajectoryError where the file is of another optimizer."""
    try:
        about = checkpoints.headers((path,)).metadata
    except CheckpointError as error:
        raise TrajectoryError(
            f"optimizer/{path.name} can't be read: {error.headline}", *error.details
        ) from error
    if about.get("optimizer") != optimizer:
        raise TrajectoryError(
            f"{path} is of another optimizer: {about.get('optimizer', 'it names none')}",
            f"expected: {optimizer}",
        )
    numbers, found = json.loads(about["numbers"]), dict[str, dict[str, Any]]()
    for label, value in load_file(path).items():
        key, _, name = label.partition("/")
        found.setdefault(name, {})[key] = value.item() if label in numbers else value
    return found


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    names = names_of(model)
    places = {
        names.get(id(own)): place
        for place, own in enumerate(
            own for group in optimizer.param_groups for own in group["params"]
        )
    }
    saved = read_state(path, name_of(optimizer))
    if unknown := [name for name in saved if name not in places]:
        raise TrajectoryError(
            f"{path} is of another optimizer: it has the state of {listed(unknown)}"
        )
    state = {places[name]: values for name, values in saved.items()}
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(parameter): name for name, parameter in model.named_parameters()}


def name_of(optimizer: torch.optim.Optimizer) -> str:
    return type(optimizer).__name__.lower()
