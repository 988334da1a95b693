"""Saved checkpoints: found, ordered by step, checked against the model before any work, loaded strictly. Never unpickled."""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from influence_cli.errors import CheckpointError, listed
from influence_cli.run.parameters import PRECISIONS, WRAPPERS
from influence_cli.storage.safetensors_io import TensorFile, TruncatedFile

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Checkpoint:
    """The parameters after `step` optimizer steps. `files`: one safetensors file, or the shards of one."""

    step: int
    path: Path
    files: tuple[Path, ...]
    learning_rate: float | None = None  # the file's own metadata
    state: Path | None = None  # an HF Trainer's trainer_state.json

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-2:])

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Header:
    """What a checkpoint says of itself without reading its tensors: key -> (file, dtype, shape), and the metadata."""

    tensors: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]


# ---------------------------------------------------------------- finding
def find_checkpoints(run: Path, folder: Path | None = None) -> list[Checkpoint]:
    """All checkpoints of a run by rising step: `checkpoints/`, or the run itself as an HF Trainer folder.

    Raises CheckpointError: none there; an unreadable file; no step to be read; two of one step.
    """
    place = folder or (run / "checkpoints" if (run / "checkpoints").is_dir() else run)
    if not place.is_dir():
        raise CheckpointError(
            f"no checkpoints: {place} is not a folder", "--checkpoints DIR names another place"
        )
    paths = sorted(
        path
        for path in place.iterdir()
        if is_checkpoint(path, strict=folder is None and place == run)
    )
    if not paths:
        pickled = [
            path.name
            for path in sorted(place.rglob("*"))
            if path.suffix in {".pt", ".pth", ".ckpt", ".bin"}
        ]
        raise CheckpointError(
            f"no checkpoints in {place}",
            "expected: step-000100.safetensors ..., or Trainer folders checkpoint-100/model.safetensors (or its index file)",
            *([f"found: {listed(pickled)}; pickled files are never opened"] if pickled else []),
            "save them with safetensors.torch.save_model(model, 'checkpoints/step-000100.safetensors')",
        )
    problems: list[str] = []
    found: list[Checkpoint] = []
    for path in paths:
        try:
            found.append(describe_checkpoint(path))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(*_together(problems, "checkpoints can't be used"))
    found.sort(key=lambda checkpoint: checkpoint.step)
    twice = [
        f"step {a.step}: {a.name} and {b.name}"
        for a, b in itertools.pairwise(found)
        if a.step == b.step
    ]
    if twice:
        raise CheckpointError(
            "two checkpoints have one step",
            *twice,
            "keep one of each, or name another folder with --checkpoints DIR",
        )
    return found


def is_checkpoint(path: Path, strict: bool) -> bool:
    """A safetensors file or a folder that holds a model; directly in a run (`strict`) only Trainer's checkpoint-N folders."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        whole = (path / "model.safetensors").is_file() or (path / INDEX).is_file()
        return whole and (not strict or re.fullmatch(r"checkpoint-\d+", path.name) is not None)
    return path.suffix == ".safetensors" and not strict


def describe_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's files, step and learning rate, from its name and headers alone."""
    files = list_shards(path)
    metadata = read_header(files).metadata
    numbers = re.findall(r"\d+", path.stem if path.is_file() else path.name)
    named = int(numbers[-1]) if numbers else None
    step = named
    if "step" in metadata:
        step = _number(path, metadata, "step", int)
        if re.search(r"(step|checkpoint)[-_]?\d+$", path.stem) and named != step:
            raise CheckpointError(
                f"{path.name} says step {named} in its name and {step} in its metadata",
                "rename it, or save it again",
            )
    if step is None:
        raise CheckpointError(
            f"{path.name} has no step: no number in its name, no `step` in its metadata",
            "name it like step-000100.safetensors",
        )
    rate = _number(path, metadata, "learning_rate", float) if "learning_rate" in metadata else None
    state = path / "trainer_state.json"
    return Checkpoint(step, path, files, rate, state if path.is_dir() and state.is_file() else None)


def _number(path: Path, metadata: dict[str, str], key: str, kind: type) -> Any:
    try:
        return kind(metadata[key])
    except ValueError:
        raise CheckpointError(
            f"{path.name}: metadata {key} is {metadata[key]!r}", "expected: a number"
        ) from None


def list_shards(path: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint: itself, model.safetensors, or those that its index file names."""
    if path.is_file():
        return (path,)
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    try:
        weights = json.loads((path / INDEX).read_text())["weight_map"]
        names = sorted(set(weights.values()))
        absent = [name for name in names if not (path / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path.name}/{INDEX} can't be read: {type(error).__name__} {error}",
            "expected: an object with `weight_map`",
        ) from error
    if absent:
        raise CheckpointError(
            f"{path.name}/{INDEX} names files that are not there: {listed(absent)}",
            "copy the missing shards",
        )
    found = read_header(tuple(path / name for name in names)).tensors
    lost = [key for key in weights if key not in found or found[key][0].name != weights[key]]
    if lost:
        raise CheckpointError(
            f"{path.name}/{INDEX} names tensors that its shards lack: {listed(lost)}",
            "copy the shards again",
        )
    return tuple(path / name for name in names)


def read_header(files: tuple[Path, ...]) -> Header:
    """Raises CheckpointError for a truncated, empty, unreadable or non-safetensors file."""
    tensors: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]] = {}
    metadata: dict[str, str] = {}
    for file in files:
        size = file.stat().st_size
        if not size:
            raise CheckpointError(
                f"{file.name} is empty (0 bytes)",
                "save it again; it was probably cut off while it was written",
            )
        try:
            with TensorFile(file) as content:
                metadata.update(content.metadata)
                for key, span in content.entries.items():
                    tensors[key] = (file, span.dtype, span.shape)
        except (ValueError, OSError) as error:
            truncated = isinstance(error, TruncatedFile)
            what = "is truncated" if truncated else "is not a safetensors file"
            raise CheckpointError(
                f"{file.name} {what} ({size:,} bytes: {error})", "save or copy it again"
            ) from error
    return Header(tensors, metadata)


# ---------------------------------------------------------------- fitting and loading
def list_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """What a checkpoint of the model holds: parameters and persistent buffers, tied ones under each of their names."""
    return {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }


def map_keys(header: Header, model: nn.Module) -> tuple[dict[str, str], list[str], dict[str, str]]:
    """Model key -> file key, missing keys, unexpected key -> file key.

    Wrapper prefixes are stripped; one alias of a tied tensor is enough.
    """
    names = {key: key for key in header.tensors}
    for prefix in WRAPPERS * 2:
        if names and all(key.startswith(prefix) for key in names):
            names = {key.removeprefix(prefix): file_key for key, file_key in names.items()}
    own = list_tensors(model)
    by_tensor: dict[int, str] = {}
    for key, tensor in own.items():
        if key in names:
            by_tensor.setdefault(id(tensor), key)
    mapping, missing = {}, []
    for key, tensor in own.items():
        if key in names:
            mapping[key] = names[key]
        elif id(tensor) not in by_tensor:
            missing.append(key)
    return mapping, missing, {key: file_key for key, file_key in names.items() if key not in own}


def check_fits_model(checkpoints: list[Checkpoint], model: nn.Module, cast: bool) -> None:
    """All checkpoints against the model, from their headers: keys, shapes and dtypes. One CheckpointError tells of all that do not fit.

    `cast`: a precision was asked for, so floating-point dtypes may differ.
    """
    own = list_tensors(model)
    problems: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        header = read_header(checkpoint.files)
        mapping, missing, unexpected = map_keys(header, model)
        lines = [f"missing:    {key} {tuple(own[key].shape)}" for key in missing]
        lines += [
            f"unexpected: {key} {header.tensors[file_key][2]}"
            for key, file_key in unexpected.items()
        ]
        for key, file_key in mapping.items():
            _, dtype, shape = header.tensors[file_key]
            if shape != tuple(own[key].shape):
                lines.append(
                    f"shape:      {key} is {shape} in the file, {tuple(own[key].shape)} in the model"
                )
            elif dtype != own[key].dtype and not (cast and dtype in PRECISIONS.values()):
                expected = str(own[key].dtype).removeprefix("torch.")
                found = str(dtype).removeprefix("torch.")
                lines.append(f"dtype:      {key} is {found} in the file, {expected} in the model")
        if lines:
            problems[checkpoint.name] = lines
    if not problems:
        return
    first, lines = next(iter(problems.items()))
    same = [name for name, found in problems.items() if found == lines]
    details = [
        *lines[:30],
        *([f"... and {len(lines) - 30:,} more lines like these"] if len(lines) > 30 else []),
    ]
    if len(same) > 1:
        details.append(f"the same in: {listed(same[1:])}")
    others = [name for name in problems if name not in same]
    if others:
        details.append(f"other misfits in: {listed(others)}")
    if all(line.startswith("dtype") for line in lines):
        details.append(
            "--precision float32 (or another) casts both; or build the model in the file's dtype in definition.py"
        )
    else:
        details.append(
            "the checkpoint was saved by another version of the model, or definition.py builds another size"
        )
    raise CheckpointError(f"{first} does not fit the model in definition.py", *details)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy a checked checkpoint's values into the model, in the model's own dtype and on its device.

    Raises CheckpointError for values that are not finite, and where two names of a tied tensor hold different values.
    """
    header = read_header(checkpoint.files)
    mapping, _, _ = map_keys(header, model)
    own = list_tensors(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    broken, untied = [], []
    for file in checkpoint.files:
        with TensorFile(file) as content, torch.no_grad():
            for key, file_key in mapping.items():
                if header.tensors[file_key][0] != file:
                    continue
                value = content.read([file_key])[file_key]
                if value.is_floating_point() and value.numel():
                    found = (
                        torch.isfinite if key in parameters else is_number
                    )  # a mask buffer may hold -inf
                    if not all(bool(found(bound)) for bound in torch.aminmax(value)):
                        wrong = ~found(value)
                        broken.append(
                            f"{key}: {int(wrong.sum()):,} of {value.numel():,} values are NaN or infinite"
                        )
                target = own[key]
                if id(target) in seen and not torch.equal(seen[id(target)][1], value):
                    untied.append(f"{seen[id(target)][0]} and {key}")
                seen[id(target)] = (key, value)
                target.data.copy_(value)
    if broken:
        raise CheckpointError(
            f"{checkpoint.name} holds values that are not finite",
            *broken,
            "training had diverged there; leave it out with --steps",
        )
    if untied:
        raise CheckpointError(
            f"{checkpoint.name} holds two values of one tied tensor",
            *untied,
            "definition.py ties parameters that were trained apart",
        )


def is_number(values: torch.Tensor) -> torch.Tensor:
    return ~torch.isnan(values)


def _together(problems: list[str], headline: str) -> tuple[str, ...]:
    """One problem as it is; several under one headline."""
    if len(problems) == 1:
        return tuple(problems[0].split("\n  "))
    return (f"{len(problems)} {headline}", *problems)
