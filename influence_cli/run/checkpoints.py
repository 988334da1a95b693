"""Finds saved checkpoints and reads their headers. Pickled files are never opened."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_cli.errors import CheckpointError, listed, shown
from influence_cli.run.foreign_checkpoints import (
    describe_missing_checkpoints,
    describe_mixed_folder,
    find_unreadable_folders,
)
from influence_cli.storage.json_text import read_json_file
from influence_cli.storage.safetensors_io import TensorFile, TruncatedFile

INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_model.safetensors"  # peft's; it holds the trained tensors alone
NUMBER = re.compile(r"[-+.0-9a-zA-Z]+")  # of metadata: int() and float() also take 1_0 and blanks


@dataclass(frozen=True)
class Checkpoint:
    """The parameters after `step` optimizer steps. `files`: one safetensors file, or its shards."""

    step: int
    path: Path
    files: tuple[Path, ...]
    learning_rate: float | None = None  # from the file's metadata
    state: Path | None = None  # the trainer_state.json of a Hugging Face Trainer
    base: str = ""  # of an adapter: the digest of the weights of model() that it is loaded over
    converted: bool = False  # whether transformers converts the files for the model

    @property
    def is_adapter(self) -> bool:
        return self.files[0].name == ADAPTER

    @property
    def name(self) -> str:
        return "/".join(self.path.parts[-2:])

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Header:
    """The headers of a checkpoint's files: tensor name -> (file, dtype, shape), and metadata."""

    tensors: dict[str, tuple[Path, torch.dtype, tuple[int, ...]]]
    metadata: dict[str, str]
    is_adapter: bool = False


# ---------------------------------------------------------------- finding
def find_checkpoints(run: Path, folder: Path | None = None) -> list[Checkpoint]:
    """All checkpoints of a run by rising step: of `checkpoints/`, or of the run itself where that
    is the output of a Hugging Face Trainer.

    Raises CheckpointError: no checkpoints; an unreadable file; an unknown step; a step with two.
    """
    place = folder or (run / "checkpoints" if (run / "checkpoints").is_dir() else run)
    if not place.is_dir():
        raise CheckpointError(
            f"no checkpoints: {place} is not a folder", "--checkpoints DIR names another folder"
        )
    strict = folder is None and place == run
    try:
        paths = sorted(path for path in place.iterdir() if is_checkpoint(path, strict))
        if not paths and strict and is_saved_model(place):
            return [describe_saved_model(place)]
        if not paths:
            raise describe_missing_checkpoints(place, run)
        if unreadable := find_unreadable_folders(place, paths):
            raise describe_mixed_folder(place, unreadable)
    except OSError as error:
        raise CheckpointError(f"{place} can't be read: {error.strerror or error}") from error
    problems: list[str] = []
    checkpoints: list[Checkpoint] = []
    for path in paths:
        try:
            checkpoints.append(describe_checkpoint(path))
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(*_join_problems(problems))
    checkpoints.sort(key=lambda checkpoint: checkpoint.step)
    duplicates = [
        f"step {one.step}: {one.name} and {other.name}"
        for one, other in itertools.pairwise(checkpoints)
        if one.step == other.step
    ]
    if duplicates:
        raise CheckpointError(
            "two checkpoints have one step",
            *duplicates,
            "keep one of each, or name another folder with --checkpoints DIR",
        )
    return checkpoints


def is_checkpoint(path: Path, strict: bool) -> bool:
    """Whether this is a safetensors file or a folder with a model. `strict`, for a run's own
    folder: only a Trainer's checkpoint-N folders count."""
    if path.name.startswith("."):
        return False
    if path.is_dir():
        has_model = any((path / name).is_file() for name in ("model.safetensors", INDEX, ADAPTER))
        return has_model and (not strict or re.fullmatch(r"checkpoint-\d+", path.name) is not None)
    return path.suffix == ".safetensors" and not strict


def is_saved_model(folder: Path) -> bool:
    """Whether a Hugging Face model was saved into this folder itself, not into checkpoint-N."""
    has_config = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    return has_config and is_checkpoint(folder, strict=False)


def describe_saved_model(folder: Path) -> Checkpoint:
    """The only checkpoint of a folder that a model was saved into. Its step is the one of
    trainer_state.json, or 1 where no file tells it.
    """
    state = folder / "trainer_state.json"
    step = 1
    if state.is_file():
        step = max(1, int(read_json_file(state, finite=False).get("global_step") or 1))
    files = list_shards(folder)
    read_header(files)
    return Checkpoint(step, folder, files, state=state if state.is_file() else None)


def describe_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint's files, step and learning rate, from its name and its headers."""
    files = list_shards(path)
    metadata = read_header(files).metadata
    numbers = re.findall(r"\d+", path.stem if path.is_file() else path.name)
    named = int(numbers[-1]) if numbers else None
    step = named
    if "step" in metadata:
        step = _parse_number(path, metadata, "step", int)
        if re.search(r"(step|checkpoint)[-_]?\d+$", path.stem) and named != step:
            raise CheckpointError(
                f"{path.name} has step {named} in its name and {step} in its metadata",
                "rename it, or save it again",
            )
    if step is None:
        raise CheckpointError(
            f"{path.name} has no step",
            "found: no number in its name, and no `step` in its metadata",
            "name it like step-000100.safetensors",
            *(
                [f"--checkpoints names the folder above: {path.absolute().parent.parent}"]
                if path.name == "model.safetensors"
                else []
            ),
        )
    if not 0 <= step < 1 << 63:
        raise CheckpointError(
            f"{path.name[:80]} has the step {shown(str(step))}",
            "expected: the number of optimizer steps before it was saved",
            "rename it, or save it again",
        )
    rate = (
        _parse_number(path, metadata, "learning_rate", float)
        if "learning_rate" in metadata
        else None
    )
    state = path / "trainer_state.json"
    return Checkpoint(step, path, files, rate, state if path.is_dir() and state.is_file() else None)


def _parse_number(  # Any: an instance of `kind`
    path: Path, metadata: dict[str, str], key: str, kind: type
) -> Any:
    try:
        if NUMBER.fullmatch(metadata[key]):
            return kind(metadata[key])
        raise ValueError
    except ValueError:
        raise CheckpointError(
            f"{path.name}: metadata {key} is no number",
            f"found: {shown(metadata[key])}; expected: a number",
            "save it again with a number, or delete the key",
        ) from None


def list_shards(path: Path) -> tuple[Path, ...]:
    """A checkpoint's safetensors files: itself, model.safetensors, those of its index file, or an
    adapter.
    """
    if path.is_file():
        return (path,)
    if (path / ADAPTER).is_file():
        if (path / "model.safetensors").is_file() or (path / INDEX).is_file():
            raise CheckpointError(
                f"{path.name} holds both a whole model and an adapter",
                f"found: {ADAPTER} beside model.safetensors or its index file",
                "move one of them to another folder",
            )
        return (path / ADAPTER,)
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    try:
        weights = read_json_file(path / INDEX)["weight_map"]
        names = sorted(set(weights.values()))
        absent = [name for name in names if not (path / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{path.name}/{INDEX} can't be read: {type(error).__name__} {error}",
            "expected: an object with `weight_map`",
        ) from error
    if absent:
        raise CheckpointError(
            f"{path.name}/{INDEX} names missing files: {listed(absent)}",
            "copy the missing shards",
        )
    tensors = read_header(tuple(path / name for name in names)).tensors
    lost = [key for key in weights if key not in tensors or tensors[key][0].name != weights[key]]
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
        if not file.is_file():
            raise CheckpointError(
                f"{file} does not exist any more", "another process has removed it: run again"
            )
        size = file.stat().st_size
        if not size:
            raise CheckpointError(
                f"{file.name} is empty (0 bytes)",
                "the process that saved it was probably killed",
                "save it again, or delete it",
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
    return Header(tensors, metadata, bool(files) and files[0].name == ADAPTER)


def _join_problems(problems: list[str]) -> tuple[str, ...]:
    """One problem as it is; several under one headline."""
    if len(problems) == 1:
        return tuple(problems[0].split("\n  "))
    return (f"{len(problems)} checkpoints can't be used", *problems)
