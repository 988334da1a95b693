"""Visits the recorded steps in reverse order, with the parameters that the model had at each.

A replay runs forward only. So it saves the state before each step of a stretch of training. If the
states do not fit into STATE_BYTES, it saves every n-th one and re-runs the steps between two of
them, recursively. Each level of the recursion takes up to STATE_BYTES.
"""

from collections.abc import Iterator

from influence_cli.errors import TrajectoryError, counted
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.progress import Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizers import describe_unknown_state
from influence_cli.run.replay import Replay
from influence_cli.run.replay_state import Moments, ReplayState

STATE_BYTES = 1 << 30
ROUNDING = 1e-3  # largest relative distance that rounding explains, as a rule
LIMIT = 0.1  # largest relative distance of a replay that reproduces training


class ReplayedSteps:
    """A replay of a plan's steps, last step first. It moves the run's model.

    Raises TrajectoryError where the optimizer's state at the first checkpoint is unknown.
    """

    def __init__(self, source: GradientSource, plan: ReversePlan) -> None:
        self.plan = plan
        self.replay = Replay(
            source.run,
            lambda ids: source.extractor.batches.of("train", ids)[0],
            source.budget.requested_batch_size,
        )
        if not self.replay.can_start_from(plan.segments[0].checkpoint):
            raise describe_unknown_state(plan.trajectory, plan.segments[0].checkpoint)
        # step of a checkpoint -> relative distance of the replay from it
        self.distances: dict[int, float] = {}

    def reversed_states(self, stop: int) -> Iterator[tuple[int, dict[str, Moments] | None]]:
        """The steps below `stop`, last first, with Adam's state before each; None for SGD.

        The model has the parameters from before the step.
        """
        starts = [
            segment.first
            for segment in self.plan.segments
            if self.replay.can_start_from(segment.checkpoint)
        ]
        stops = [*starts[1:], self.plan.steps.stop]
        for first, after in reversed(list(zip(starts, stops, strict=True))):
            if first >= stop:
                continue
            self.replay.start_from(self.plan.segment_at(first).checkpoint)
            # to the next checkpoint, to compare the replay with it
            end = min(after, self.plan.segment_at(stop - 1).stop)
            for state in self._reversed_states(self.replay.save_state(), end):
                if state.step < stop:
                    self.replay.restore(state)
                    yield state.step, self.replay.moments() if self.plan.adam else None

    def _reversed_states(self, first: ReplayState, stop: int) -> Iterator[ReplayState]:
        """The states before each step from `first` to `stop`, last first."""
        tensors = 1 + bool(self.plan.with_momentum) + self.plan.adam  # of a parameter's size
        state_bytes = tensors * sum(value.nbytes for value in first.values)
        most = max(2, STATE_BYTES // max(1, state_bytes))
        stride = -(-(stop - first.step) // most)
        states = []
        self.replay.restore(first)
        for step in range(first.step, stop):
            if (step - first.step) % stride == 0:
                states.append(self.replay.save_state())
            self._advance(step)
        while states:
            state = states.pop()
            if stride == 1:
                yield state
            else:
                yield from self._reversed_states(state, stop)
            stop = state.step

    def _advance(self, step: int) -> None:
        """Re-run one step. At a checkpoint, measure the distance and continue from there."""
        self.replay.advance(step + 1)
        if step + 1 != self.plan.segment_at(step).stop:
            return
        following = next((other for other in self.plan.segments if other.first == step + 1), None)
        checkpoint = following.checkpoint if following else self.plan.end
        if checkpoint.step == step + 1 and checkpoint.step not in self.distances:
            self.distances[checkpoint.step] = self._compare(checkpoint)
        if following:
            self.replay.continue_from(following.checkpoint)

    def _compare(self, checkpoint: Checkpoint) -> float:
        distance = self.replay.relative_distance(checkpoint)
        if distance <= LIMIT:
            return distance
        without_replay = "without --replay, all steps use gradients of the previous checkpoint"
        raise TrajectoryError(
            f"replaying the recorded steps does not reproduce {checkpoint.name}: relative "
            f"distance {distance:.2g} (limit {LIMIT})",
            *self._list_causes(),
            *([] if self.plan.adam else [without_replay]),
        )

    def _list_causes(self) -> list[str]:
        """Lines of an error."""
        if any(line.training for line in self.plan.trajectory.lines):
            return [
                "a replay runs in train mode, with the trajectory's batches, seeds and rates",
                "possible causes: batches that are padded in another way than in training, "
                "torch.compile, data augmentation, another precision, or the state in optimizer/",
            ]
        return [
            "a replay runs in eval mode, with the trajectory's batches and learning rates",
            "possible causes: dropout or BatchNorm's batch statistics (TrajectoryRecorder(..., "
            "seed=0) records what a replay needs), data augmentation, another precision, the "
            "state in optimizer/, or steps that were recorded wrongly",
        ]

    def report_agreement(self, reporter: Reporter) -> None:
        """Report how well the replay reproduced the saved checkpoints, if it reached one."""
        if self.distances:
            reporter.note(self._describe_agreement())

    def _describe_agreement(self) -> str:
        step = max(self.distances, key=lambda step: self.distances[step])
        largest = self.distances[step]
        checkpoints = counted(len(self.distances), "saved checkpoint")
        if not largest:
            return f"replay: it reproduced {checkpoints} bit for bit"
        text = (
            f"replay: it reproduced {checkpoints}; the largest relative distance is {largest:.2g} "
            f"(step {step:,})"
        )
        if largest < ROUNDING:
            return text
        return f"{text}. Rounding alone is smaller: this may not be the recorded training"
