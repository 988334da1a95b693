"""The steps of a reverse pass, in segments between checkpoints.

All steps of a segment use gradients taken at the segment's first checkpoint, each step with its own
batch, learning rate and clipping. With --replay each step uses gradients at its own parameters.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from influence_cli.methods.reverse.optimizer_adjoint import AdamUpdate, SgdUpdate, Update
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizers import read_options
from influence_cli.run.parameters import Column
from influence_cli.run.replay_state import Moments
from influence_cli.run.trajectory import Trajectory


@dataclass(frozen=True)
class Segment:
    """The steps first..stop, exclusive, with the checkpoint where their gradients are taken."""

    checkpoint: Checkpoint
    first: int
    stop: int


@dataclass(frozen=True)
class ReversePlan:
    """The steps of a reverse pass. `segments`: by rising step. `end`: the checkpoint to explain.

    `columns`: the selected parameters that were trained. `notes`: what a user should know.
    """

    trajectory: Trajectory
    segments: tuple[Segment, ...]
    end: Checkpoint
    columns: dict[str, Column]
    notes: tuple[str, ...]

    @property
    def steps(self) -> range:
        return range(self.segments[0].first, self.segments[-1].stop)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that gradients are taken at: of each segment, and the end."""
        return [*(segment.checkpoint for segment in self.segments), self.end]

    @property
    def adam(self) -> bool:
        """Whether the optimizer is Adam or AdamW."""
        return self.trajectory.optimizer in ("adam", "adamw")

    @property
    def with_momentum(self) -> list[str]:
        """The parameters whose steps have a state: SGD's momentum buffer, or Adam's m."""
        return [
            name
            for name, column in self.columns.items()
            if self.adam or momentum_of(self.trajectory.groups[self.group_of(column)].options)
        ]

    @property
    def examples_by_checkpoint(self) -> list[tuple[Checkpoint, np.ndarray]]:
        """The examples whose gradients the segments need, at each segment's checkpoint."""
        return [
            (segment.checkpoint, ids)
            for segment in self.segments
            if len(ids := self.examples(segment))
        ]

    def updates(self, step: int, moments: Mapping[str, Moments] | None = None) -> dict[str, Update]:
        """The optimizer's rule for each parameter at a step. `moments`: Adam's state before it."""
        rates, updates = self.trajectory.rates(step), dict[str, Update]()
        for name, column in self.columns.items():
            number = self.group_of(column)
            if moments is None:
                updates[name] = sgd_update(rates[number], self.trajectory.groups[number].options)
            else:
                updates[name] = adam_update(self.trajectory, number, rates[number], moments[name])
        return updates

    def group_of(self, column: Column) -> int:
        """The number of the parameter group of a column."""
        number = self.trajectory.group_of(column.names)
        assert number is not None
        return number

    def count_occurrences(self, steps: range | None = None) -> int:
        """The number of entries of these steps' batches. None: of all steps."""
        lines = self.trajectory.lines
        return sum(len(lines[step].examples) for step in (self.steps if steps is None else steps))

    def occurrences(self, steps: range) -> tuple[np.ndarray, np.ndarray]:
        """(M,) the step and the example of each entry of these steps, last step first."""
        lines = self.trajectory.lines
        batches = [np.sort(lines[step].examples, kind="stable") for step in reversed(steps)]
        counts = [len(examples) for examples in batches]
        examples = np.concatenate([np.empty(0, np.int64), *batches])
        return np.repeat(np.array(steps[::-1], np.int64), counts), examples

    def examples(self, segment: Segment) -> np.ndarray:
        """The ids of a segment's examples, rising."""
        steps = range(segment.first, segment.stop)
        return np.unique(np.concatenate([self.trajectory.lines[step].examples for step in steps]))

    def between(self, first: int, stop: int) -> tuple[Segment, ...]:
        """The segments, or parts of segments, of the steps first..stop, exclusive."""
        cut = (Segment(s.checkpoint, max(s.first, first), min(s.stop, stop)) for s in self.segments)
        return tuple(segment for segment in cut if segment.first < segment.stop)

    def segment_at(self, step: int) -> Segment:
        """The segment of a step."""
        position = bisect_right(self.segments, step, key=lambda segment: segment.first) - 1
        assert position >= 0 and step < self.segments[position].stop
        return self.segments[position]


def momentum_of(options: Mapping[str, object]) -> float:
    """SGD's momentum in the options of a parameter group."""
    return float(options.get("momentum", 0))  # type: ignore[arg-type]  # build_plan checks it


def sgd_update(rate: float, options: Mapping[str, object]) -> SgdUpdate:
    """SGD's rule for the options of a parameter group."""
    decay = float(options.get("weight_decay", 0))  # type: ignore[arg-type]  # as above
    return SgdUpdate(rate, momentum_of(options), decay, bool(options.get("nesterov")))


def adam_update(trajectory: Trajectory, group: int, rate: float, before: Moments) -> AdamUpdate:
    """Adam's or AdamW's rule of a parameter group, for a parameter whose state was `before`."""
    options = read_options(trajectory, group)
    decoupled = trajectory.optimizer == "adamw" or bool(options.get("decoupled_weight_decay"))
    decay = float(options["weight_decay"])
    return AdamUpdate(rate, options["betas"], options["eps"], decay, decoupled, before)
