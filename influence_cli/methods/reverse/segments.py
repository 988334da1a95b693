"""What is gone back over: the recorded steps in segments, each of which has its gradients at the
checkpoint it begins with.

Between two checkpoints, a segment, the gradients are those of its first one, with each step's own
batch, step size and clipping; or, in a replay, those of where each step was.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from influence_cli.errors import TrajectoryError, UsageProblem, listed
from influence_cli.methods.reverse.optimizer_adjoint import AdamUpdate, AnyUpdate, Update
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizers import OPTIMIZERS, read_options
from influence_cli.run.parameters import Column
from influence_cli.run.replay import Moments
from influence_cli.run.run import Run
from influence_cli.run.trajectory import Trajectory, missing_trajectory


@dataclass(frozen=True)
class Segment:
    """The steps first..stop, whose gradients are taken at one checkpoint."""

    checkpoint: Checkpoint
    first: int
    stop: int


@dataclass(frozen=True)
class ReversePlan:
    """Which steps are gone back over, in segments by rising step; `end`: the checkpoint whose
    quantity is explained.
    """

    trajectory: Trajectory
    segments: tuple[Segment, ...]
    end: Checkpoint
    columns: dict[str, Column]  # those that were trained
    notes: tuple[str, ...]

    @property
    def steps(self) -> range:
        return range(self.segments[0].first, self.segments[-1].stop)

    def updates(
        self, step: int, moments: Mapping[str, Moments] | None = None
    ) -> dict[str, AnyUpdate]:
        """How the step changed each parameter. `moments`: where Adam stood."""
        rates, updates = self.trajectory.rates(step), dict[str, AnyUpdate]()
        for name, column in self.columns.items():
            number = self.group_of(column)
            options = self.trajectory.groups[number].options
            if moments is None:
                updates[name] = Update(
                    rates[number],
                    momentum(options),
                    float(options.get("weight_decay", 0)),
                    bool(options.get("nesterov")),
                )
            else:
                options = read_options(self.trajectory, number)
                decoupled = self.trajectory.optimizer == "adamw" or bool(
                    options.get("decoupled_weight_decay")
                )
                decay = float(options["weight_decay"])
                updates[name] = AdamUpdate(
                    rates[number], options["betas"], options["eps"], decay, decoupled, moments[name]
                )
        return updates

    def group_of(self, column: Column) -> int:
        number = self.trajectory.group_of(column.names)
        assert number is not None
        return number

    @property
    def adam(self) -> bool:
        return self.trajectory.optimizer in ("adam", "adamw")

    @property
    def with_momentum(self) -> list[str]:
        """Those whose steps have a state: a buffer of momentum, or Adam's m."""
        return [
            n
            for n, c in self.columns.items()
            if self.adam or momentum(self.trajectory.groups[self.group_of(c)].options)
        ]

    def occurrences(self, steps: range | None = None) -> int:
        return sum(
            len(self.trajectory.lines[step].examples)
            for step in (self.steps if steps is None else steps)
        )

    def examples(self, segment: Segment) -> np.ndarray:
        """The ids of a segment's examples, rising."""
        return np.unique(
            np.concatenate(
                [
                    self.trajectory.lines[step].examples
                    for step in range(segment.first, segment.stop)
                ]
            )
        )

    @property
    def wanted(self) -> list[tuple[Checkpoint, np.ndarray]]:
        """Whose gradients are needed, at each segment's checkpoint."""
        return [
            (segment.checkpoint, ids)
            for segment in self.segments
            if len(ids := self.examples(segment))
        ]

    def between(self, first: int, stop: int) -> "tuple[Segment, ...]":
        """The segments, or parts of them, of these steps."""
        cut = (Segment(s.checkpoint, max(s.first, first), min(s.stop, stop)) for s in self.segments)
        return tuple(segment for segment in cut if segment.first < segment.stop)


def momentum(options: Mapping[str, object]) -> float:
    return float(options.get("momentum", 0))  # type: ignore[arg-type]


def plan(
    run: Run,
    checkpoints: tuple[Checkpoint, ...],
    columns: dict[str, Column],
    at: int | None = None,
    replay: bool = False,
    method: str = "dve",
) -> ReversePlan:
    """`replay`: gradients are taken where each step was, so that steps before the first checkpoint
    are out of reach.

    Raises TrajectoryError: no trajectory, one that ends too early, an optimizer without an adjoint
    here; UsageProblem for `at`.
    """
    trajectory = run.trajectory
    if trajectory is None:
        raise missing_trajectory(method)
    check_optimizer(trajectory, replay, method)
    if at is not None and at not in [checkpoint.step for checkpoint in checkpoints]:
        steps = listed([checkpoint.step for checkpoint in checkpoints], 20)
        raise UsageProblem(
            f"--at {at}: no checkpoint there", f"there are checkpoints of the steps {steps}"
        )
    checkpoints = tuple(
        checkpoint for checkpoint in checkpoints if at is None or checkpoint.step <= at
    )
    end, notes = checkpoints[-1], list(trajectory.notes)
    if end.step > trajectory.steps:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {end.name}",
            f"it has the steps 0 to {trajectory.steps - 1:,}; a checkpoint of step "
            f"{trajectory.steps:,} is the last it can explain",
            "--at STEP or --steps chooses another end; or the trajectory is of another run",
        )
    if not end.step:
        raise UsageProblem(
            f"{end.name} is from before the first step: nothing was trained on",
            "--at STEP or --steps chooses a later end",
        )
    if end.step < trajectory.steps and at is None:
        notes.append(
            f"steps {end.step:,} to {trajectory.steps - 1:,} come after the last checkpoint and "
            "are left out"
        )
    starts = [*checkpoints[:-1]] or [end]
    begin = starts[0].step if replay else 0
    if replay and begin == end.step:
        raise UsageProblem(
            f"--replay trains again from a checkpoint on, and {end.name} is the only one",
            "--steps chooses an earlier one too",
        )
    if starts[0].step:
        what = (
            "are left out: a replay can't go there"
            if replay
            else f"have the gradients of {starts[0].name}"
        )
        notes.append(
            f"steps 0 to {min(starts[0].step, end.step) - 1:,} come before the first checkpoint "
            f"and {what}"
        )
    edges = [begin, *(checkpoint.step for checkpoint in starts[1:]), end.step]
    segments = tuple(
        Segment(c, first, stop)
        for c, first, stop in zip(starts, edges[:-1], edges[1:], strict=True)
    )
    trained = {
        name: column
        for name, column in columns.items()
        if trajectory.group_of(column.names) is not None
    }
    if len(trained) < len(columns):
        notes.append(
            "never trained, by the trajectory's groups: "
            f"{listed([name for name in columns if name not in trained])}"
        )
    if not trained:
        raise UsageProblem(
            "none of the selected parameters was trained, by the trajectory's groups",
            f"selected: {listed(columns)}",
        )
    if len(columns) < len(run.columns) and any(
        line.clip != 1 for line in trajectory.lines[: end.step]
    ):
        notes.append(
            "steps were clipped by the norm over all parameters; here it is the norm over the "
            "selected ones"
        )
    return ReversePlan(trajectory, segments, end, trained, tuple(notes))


def check_optimizer(trajectory: Trajectory, replay: bool, method: str) -> None:
    if trajectory.optimizer is None:
        raise TrajectoryError(
            f"{trajectory.path.name}: the header names no optimizer",
            'expected: "optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, '
            "torch's names",
        )
    if trajectory.optimizer not in OPTIMIZERS:
        raise TrajectoryError(
            f"{trajectory.path.name}: {method} has no adjoint for steps of {trajectory.optimizer}",
            "expected: sgd (with momentum, nesterov, weight_decay), adam or adamw; --method tracin "
            "reads gradients alone",
        )
    if trajectory.optimizer != "sgd" and not replay:
        raise TrajectoryError(
            f"{method} needs the moment estimates of {trajectory.optimizer} at every step, and "
            "checkpoints do not store them",
            "--replay recovers them by re-running the recorded steps",
            "--method tracin reads gradients alone",
        )
    for number, group in enumerate(trajectory.groups):
        for name in ("dampening", "maximize", "amsgrad"):
            if group.options.get(name):
                what = (
                    f"{trajectory.optimizer} with {name} = {group.options[name]!r} has no adjoint "
                    "here"
                )
                raise TrajectoryError(
                    f"{trajectory.path.name}: {what}", "--method tracin reads gradients alone"
                )
        for name in ("momentum", "weight_decay"):
            value = group.options.get(name, 0)
            if (
                isinstance(value, bool)
                or not isinstance(value, int | float)
                or not 0 <= value < float("inf")
            ):
                raise TrajectoryError(
                    f"{trajectory.path.name}: {name} is {value!r}", "expected: a number from 0"
                )
        read_options(trajectory, number)
