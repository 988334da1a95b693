"""A recorded training: which examples each optimizer step used, and at which learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from influence_cli.errors import TrajectoryError
from influence_cli.run.training_mode import TrainingMode


class Line(NamedTuple):
    """One optimizer step. The optimizer's gradient was `clip` times the sum over the entries of
    weight times gradient."""

    lr: float | tuple[float, ...]  # one, or one per parameter group
    examples: np.ndarray  # (B,) ids; an example that occurs twice is two entries
    weights: np.ndarray | None  # (B,) float64; None: by the header's reduction
    clip: float
    seed: int | None
    training: TrainingMode | None = None  # of its forward passes; None: eval mode


@dataclass(frozen=True)
class Group:
    """Parameters that share options. `names`: empty for all parameters. `options`: torch's
    arguments of the optimizer; absent ones have torch's default."""

    names: tuple[str, ...]
    options: Mapping[str, Any]  # Any: JSON values


@dataclass(frozen=True)
class Trajectory:
    """`lines[t]` is step t. `optimizer`: torch's lower-case name; None if the header has none.
    `device`: the kind of device that drew random masks.
    """

    path: Path
    lines: tuple[Line, ...]
    reduction: str | None = None
    optimizer: str | None = None
    groups: tuple[Group, ...] = (Group((), {}),)
    notes: tuple[str, ...] = field(default=())
    device: str | None = None

    @property
    def steps(self) -> int:
        """T, the number of steps: the last line's step plus 1."""
        return len(self.lines)

    def rates(self, step: int) -> tuple[float, ...]:
        """The learning rate of each group."""
        rate = self.lines[step].lr
        return rate if isinstance(rate, tuple) else (rate,) * len(self.groups)

    def weights(self, step: int) -> np.ndarray:
        """(B,) w of each entry: the step's loss was the sum of w times loss.

        Raises TrajectoryError where neither the line nor the header determines them.
        """
        line = self.lines[step]
        if line.weights is not None:
            return line.weights
        if self.reduction is None:
            raise TrajectoryError(
                f"{self.path.name}: step {step} has no weights, and the header no `reduction`",
                "expected: weights in each line, or a reduction in the header",
                'add "reduction": "mean" (each entry weighs 1/|B|) or "sum" (each weighs 1)',
            )
        return np.full(
            len(line.examples), 1 / max(1, len(line.examples)) if self.reduction == "mean" else 1.0
        )

    def group_of(self, names: tuple[str, ...]) -> int | None:
        """The group of the parameter with these (tied) names; None if it was never trained."""
        for number, group in enumerate(self.groups):
            if not group.names or set(names) & set(group.names):
                return number
        return None


def missing_trajectory(what: str) -> TrajectoryError:
    """The one error of everything that needs the order of training. `what`: who needs it."""
    return TrajectoryError(
        f"{what} needs the order of training, and this run has no trajectory",
        "expected: RUN/trajectory.jsonl, with the batch and the learning rate of each step",
        "--trajectory FILE names one elsewhere; TrajectoryRecorder writes one:",
        'with TrajectoryRecorder("RUN", model, optimizer, checkpoint_every=100) as recorder:',
        "    for indices, batch in loader: ...; recorder.step(indices); optimizer.step()",
    )
