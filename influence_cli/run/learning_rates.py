"""The learning-rate weight of each checkpoint in TracIn."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from influence_cli.errors import CheckpointError, TrajectoryError, UsageProblem, listed
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.scheduler_files import SCHEDULER, read_scheduler_rate
from influence_cli.run.trajectory import Trajectory
from influence_cli.storage.json_text import read_json_file

CHOICES = ("point", "segment", "none")


class NoLearningRate(UsageProblem):
    """No source has the learning rate of a checkpoint."""


@dataclass(frozen=True)
class Weight:
    """η of one checkpoint: one for all parameters, or one per parameter group. `source` names its
    origin, for people."""

    step: int
    rates: tuple[float, ...]
    source: str
    groups: Mapping[str, int] | None = None  # parameter name -> index into rates

    def of(self, names: Sequence[str]) -> float:
        """The weight of the parameter with these (tied) names."""
        if len(self.rates) == 1:
            return self.rates[0]
        for name in names:
            if self.groups is not None and name in self.groups:
                return self.rates[self.groups[name]]
        raise TrajectoryError(
            f"no parameter group of the trajectory's header names {names[0]}",
            "expected: each trained parameter in one group",
        )

    @property
    def is_zero(self) -> bool:
        return not any(self.rates)

    def __str__(self) -> str:
        return ", ".join(f"{rate:.6g}" for rate in self.rates)


def weigh_checkpoints(
    checkpoints: Sequence[Checkpoint],
    trajectory: Trajectory | None,
    choice: str = "point",
    override: float | None = None,
    every: Sequence[Checkpoint] | None = None,
) -> list[Weight]:
    """One weight per checkpoint, in order.

    `every`: all checkpoints of the run; a segment starts at the previous one of them.
    Raises NoLearningRate where no source has a weight.
    """
    if override is not None:
        return [Weight(checkpoint.step, (override,), "--lr") for checkpoint in checkpoints]
    if choice == "none":
        return [Weight(checkpoint.step, (1.0,), "--lr-weights none") for checkpoint in checkpoints]
    if trajectory is not None:
        steps = [checkpoint.step for checkpoint in every or checkpoints]
        return [
            _weigh_by_trajectory(
                trajectory, checkpoint, max([0, *(s for s in steps if s < checkpoint.step)]), choice
            )
            for checkpoint in checkpoints
        ]
    if choice == "segment":
        raise UsageProblem(
            "--lr-weights segment needs a trajectory.jsonl",
            "--trajectory FILE names one; --lr-weights point does without",
        )
    weights, missing, ended = [], [], []
    for checkpoint in checkpoints:
        weight = _read_saved_rate(checkpoint)
        if weight is None:
            missing.append(checkpoint.name)
        elif weight.is_zero and weight.source.startswith(SCHEDULER):
            ended.append(checkpoint.name)
        else:
            weights.append(weight)
    if missing or ended:
        raise _describe_missing_rates(missing, ended)
    return weights


def _describe_missing_rates(missing: Sequence[str], ended: Sequence[str]) -> NoLearningRate:
    """`ended`: checkpoints whose scheduler.pt has the rate 0, of a step that was never taken."""
    details = []
    if missing:
        details.append(
            "looked in: trajectory.jsonl, the checkpoint's metadata (learning_rate), "
            f"trainer_state.json, {SCHEDULER}"
        )
    if ended:
        details.append(
            f"{SCHEDULER} of {listed(ended)} has the rate 0: the schedule ended there, and the "
            "rate of the last step is not saved. --steps leaves a checkpoint out"
        )
    return NoLearningRate(
        f"no learning rate for {listed([*missing, *ended])}",
        *details,
        "--lr X gives one for all checkpoints; --lr-weights none weighs them alike",
    )


def _weigh_by_trajectory(
    trajectory: Trajectory, checkpoint: Checkpoint, previous: int, choice: str
) -> Weight:
    step, last = checkpoint.step, trajectory.steps
    names = {name: number for number, group in enumerate(trajectory.groups) for name in group.names}
    if step > last:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {checkpoint.name}",
            f"it has the steps 0 to {last - 1:,}; it can weigh checkpoints up to step {last:,}",
            "it is of another run, or lines are missing at its end; --lr X weighs without it",
        )
    file = trajectory.path.name
    if choice == "segment":
        lines = [trajectory.rates(line) for line in range(previous, step)]
        rates = tuple(map(sum, zip(*lines, strict=True))) if lines else (0.0,)
        return Weight(
            step,
            rates,
            f"{file}, steps {previous} to {step - 1}" if lines else f"{file}, no step before it",
            names,
        )
    line = step if step < last else last - 1
    return Weight(step, trajectory.rates(line), f"{file}, step {line}", names)


def _read_saved_rate(checkpoint: Checkpoint) -> Weight | None:
    if checkpoint.learning_rate is not None:
        weight: Weight | None = Weight(checkpoint.step, (checkpoint.learning_rate,), "metadata")
    else:
        weight = find_trainer_rate(checkpoint)
    if weight and not 0 <= weight.rates[0] < math.inf:
        raise CheckpointError(
            f"{checkpoint.name} has the learning rate {weight} ({weight.source})",
            "expected: 0 or more; --lr X overrides",
        )
    return weight


def find_trainer_rate(checkpoint: Checkpoint) -> Weight | None:
    """The rate that trainer_state.json logs up to the checkpoint's step, else that of the next step
    in scheduler.pt. Raises CheckpointError for files that can't be read."""
    logged = _read_trainer_rate(checkpoint, checkpoint.state) if checkpoint.state else None
    scheduler = checkpoint.path / SCHEDULER
    if logged is not None or not scheduler.is_file():
        return logged
    rate = read_scheduler_rate(scheduler)
    return None if rate is None else Weight(checkpoint.step, (rate,), f"{SCHEDULER}, next step")


def whole_step(value: str | float) -> int:
    """Raises ValueError, TypeError or OverflowError."""
    step = int(value)
    if isinstance(value, float) and step != value:
        raise ValueError(f"the step {value} is not whole")
    return step


def _read_trainer_rate(checkpoint: Checkpoint, state: Path) -> Weight | None:
    """A Hugging Face Trainer logs the rate at some steps: the last entry up to this step."""
    try:
        # a diverged training logs NaN
        log = read_json_file(state, finite=False).get("log_history", [])
        logged = {
            whole_step(entry["step"]): float(entry["learning_rate"])
            for entry in log
            if "learning_rate" in entry
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError) as error:
        raise CheckpointError(
            f"{state.parent.name}/{state.name} can't be read: {type(error).__name__} {error}",
            "--lr X does without",
        ) from error
    before = [step for step in logged if step <= checkpoint.step]
    if not before:
        return None
    return Weight(
        checkpoint.step, (logged[max(before)],), f"{state.name}, logged at step {max(before)}"
    )
