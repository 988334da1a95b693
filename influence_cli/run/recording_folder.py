"""What a recorder finds in its folder: an earlier part of this training, or another training."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from influence_cli.errors import TrajectoryError, listed
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizer_state import list_checkpoints, matches_parameters
from influence_cli.run.recording_header import KERNELS, list_differences
from influence_cli.run.trajectory_reader import read_trajectory
from influence_cli.storage.json_text import parse_json, parse_sealed_json

HOW_TO_RESUME = (
    "to resume: start = TrajectoryRecorder.restore(dir, model, optimizer), "
    "then TrajectoryRecorder(..., start=start)"
)


@dataclass(frozen=True)
class EarlierPart:
    """`lines`: those before `start`, without the header. `has_checkpoint`: of the step `start`."""

    lines: list[bytes]
    has_checkpoint: bool


def read_earlier_part(
    folder: Path,
    start: int,
    header: dict[str, Any],
    model: nn.Module,  # Any: JSON values
) -> EarlierPart:
    """What the folder has of this training up to `start`.

    Raises TrajectoryError where the folder holds something else than the beginning of it.
    """
    path = folder / "trajectory.jsonl"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    saved = list_checkpoints(folder)
    current = next((checkpoint for checkpoint in saved if checkpoint.step == start), None)
    same_model = current is not None and matches_parameters(current, model)
    later = [checkpoint.name for checkpoint in saved if checkpoint.step > start]
    if not start and lines[1:] and (later or not same_model):
        raise describe_other_training(path, len(lines) - 1, saved)
    if later:
        raise TrajectoryError(
            f"{folder} holds checkpoints after step {start}, of another training: {listed(later)}",
            "delete them",
            HOW_TO_RESUME,
        )
    if not start:
        # an earlier training started from these parameters, and ended before a second checkpoint
        return EarlierPart([], False)
    recorded = read_trajectory(path, None).steps if lines else 0
    if recorded < start:
        raise TrajectoryError(
            f"{path} lacks the steps {recorded} to {start - 1}, and start is {start}",
            "every step needs its line",
            "start is the number of steps that model and optimizer have taken",
        )
    before = without_kernels(parse_sealed_json(lines[0]))
    if differences := list_differences(before, without_kernels(header)):
        raise TrajectoryError(
            f"{path} has another header than this training",
            *differences,
            "resume with the same options, or record into another folder",
        )
    if current and not same_model:
        raise TrajectoryError(
            f"start is {start}, and the model is not that of {current.name}", HOW_TO_RESUME
        )
    earlier = [line + b"\n" for line in lines[1:] if read_step(line) < start]
    return EarlierPart(earlier, current is not None)


def without_kernels(header: dict[str, Any]) -> dict[str, Any]:  # Any: JSON values
    """A header without the optimizer's kernels: a resumed training may use others."""
    options = {
        key: value for key, value in header.get("optimizer", {}).items() if key not in KERNELS
    }
    groups = [
        {key: value for key, value in group.items() if key not in KERNELS}
        for group in header.get("groups", [])
    ]
    return header | {"optimizer": options} | ({"groups": groups} if groups else {})


def describe_other_training(path: Path, steps: int, saved: list[Checkpoint]) -> TrajectoryError:
    return TrajectoryError(
        f"{path} records a training already, {steps:,} steps of it",
        f"checkpoints: {listed([checkpoint.name for checkpoint in saved]) or 'none'}",
        HOW_TO_RESUME,
        "to begin a new one: use another folder, "
        "or delete trajectory.jsonl, checkpoints/ and optimizer/",
    )


def read_step(line: bytes) -> float:
    """The step of a line; infinity for an incomplete one."""
    try:
        return parse_json(line)["step"]
    except ValueError:
        return math.inf
