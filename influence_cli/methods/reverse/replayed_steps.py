"""The recorded steps of a plan, run again from its checkpoints, so that each gradient is taken
where its step was; last step first.

A replay goes forward only: of a stretch of steps the states before each are kept, or, where they
are many, evenly spread ones, from which the others are run again. Memory: STATE_BYTES, and again
for each level of that.
"""

from collections.abc import Iterator

from influence_cli.errors import TrajectoryError
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.segments import ReversePlan, Segment
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizers import describe_unknown_state
from influence_cli.run.replay import Moments, Replay, State

STATE_BYTES = 1 << 30
ODD = 1e-3  # more than rounding does, as a rule
# a replay that ends so far from the saved checkpoint, of the way that training went, is another
# training
FAR = 0.1


class ReplayedSteps:
    """Stands, step by step from the last to the first, with the run's model where each step was
    taken.
    """

    def __init__(self, gradients: GradientSource, plan: ReversePlan) -> None:
        """Raises TrajectoryError where the state of the optimizer at the first checkpoint is not
        known.
        """
        self.gradients, self.plan = gradients, plan
        self.replay = Replay(
            gradients.run,
            lambda ids: gradients.extractor.batch("train", ids)[0],
            gradients.budget.requested_batch_size,
        )
        if not self.replay.starts_at(plan.segments[0].checkpoint):
            raise describe_unknown_state(plan.trajectory, plan.segments[0].checkpoint)
        self.distances: dict[
            int, float
        ] = {}  # per checkpoint that a replay came to: how far it ended from it

    def back(self, stop: int) -> Iterator[tuple[int, Checkpoint, dict[str, Moments] | None]]:
        """The steps below `stop`, last first: the number, the checkpoint before it, and where Adam
        stood. The model stands there.
        """
        starts = [
            segment.first
            for segment in self.plan.segments
            if self.replay.starts_at(segment.checkpoint)
        ]
        for first, after in reversed(
            list(zip(starts, [*starts[1:], self.plan.steps.stop], strict=True))
        ):
            if first < stop:
                self.replay.begin(self.segment(first).checkpoint)
                for state in self._states(self.replay.state(), min(after, self.end_of(stop))):
                    if state.step < stop:
                        self.replay.go_to(state)
                        moments = self.replay.moments() if self.plan.adam else None
                        yield state.step, self.segment(state.step).checkpoint, moments

    def end_of(self, stop: int) -> int:
        """The end of the segment that the step before `stop` is in: a replay is checked there."""
        return self.segment(stop - 1).stop

    def _states(self, first: State, stop: int) -> Iterator[State]:
        """Before each step from `first` on, the last first."""
        state_bytes = sum(value.nbytes for value in first.parameters) * (
            1 + bool(self.plan.with_momentum) + self.plan.adam
        )
        room = max(2, STATE_BYTES // max(1, state_bytes))
        count = stop - first.step
        stride = -(-count // room)
        kept = []
        self.replay.go_to(first)
        for step in range(first.step, stop):
            if (step - first.step) % stride == 0:
                kept.append(self.replay.state())
            self._advance(step)
        while kept:
            state = kept.pop()
            if stride == 1:
                yield state
            else:
                yield from self._states(state, stop)
            stop = state.step

    def _advance(self, step: int) -> None:
        """Run one step; at a checkpoint see how far from it that ended, and go on from the
        checkpoint.
        """
        self.replay.advance(step + 1)
        segment = self.segment(step)
        if step + 1 == segment.stop:
            following = next(
                (other for other in self.plan.segments if other.first == segment.stop), None
            )
            checkpoint = following.checkpoint if following else self.plan.end
            if checkpoint.step == step + 1 and checkpoint.step not in self.distances:
                self.distances[checkpoint.step] = self._compare(checkpoint)
            if following:
                self.replay.anchor(following.checkpoint)

    def _compare(self, checkpoint: Checkpoint) -> float:
        distance = self.replay.relative_distance(checkpoint)
        if not distance <= FAR:
            raise TrajectoryError(
                f"replaying the recorded steps does not reproduce {checkpoint.name}: relative "
                f"distance {distance:.2g} (limit {FAR})",
                "a replay runs in eval mode, with the trajectory's batches and learning rates",
                "possible causes: dropout, BatchNorm's batch statistics, data augmentation, "
                "another precision, the state in optimizer/, or steps that were recorded wrongly",
                *(
                    []
                    if self.plan.adam
                    else ["without --replay, all steps use gradients of the previous checkpoint"]
                ),
            )
        return distance

    def segment(self, step: int) -> Segment:
        return next(
            segment for segment in self.plan.segments if segment.first <= step < segment.stop
        )

    def note(self) -> str:
        """How well training that was run again agrees with the saved checkpoints."""
        worst = max(self.distances, key=lambda step: self.distances[step])
        off = self.distances[worst]
        many = f"{len(self.distances)} saved checkpoint{'s' * (len(self.distances) != 1)}"
        if not off:
            return f"replay: it reproduced {many} bit for bit"
        said = (
            f"replay: it reproduced {many}; the largest relative distance is {off:.2g} "
            f"(step {worst:,})"
        )
        return (
            said
            if off < ODD
            else f"{said}; more than rounding: it may not be the training that was recorded"
        )
