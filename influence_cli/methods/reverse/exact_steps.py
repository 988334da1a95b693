"""The steps of unroll: the gradient and the exact curvature of each step's loss, from the model.

Letters: B entries of a batch.
"""

from collections.abc import Iterator

import numpy as np
import torch

from influence_cli.extraction.batch_curvature import BatchCurvature
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.exact_batch import ExactBatch
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import PassSettings, ReverseStep
from influence_cli.methods.unroll import UnrollOptions
from influence_cli.run.replay_state import Moments


class ExactSteps:
    """A StepSource that runs the model: no gradient of a training example is formed or cached.

    Raises DefinitionError where definition.py lacks a function that the curvature needs.
    """

    def __init__(self, source: GradientSource, plan: ReversePlan, options: UnrollOptions) -> None:
        self.source, self.plan, self.replay = source, plan, options.replay
        self.curvature = BatchCurvature(source, list(plan.columns), options.curvature)

    def prepare(self) -> None:
        """Check the curvature, and probe memory before the reverse pass moves the model.

        Raises GradientError where the curvature differs from differences of gradients.
        """
        self.source.run.model.at(self.plan.segments[0].checkpoint)
        self.curvature.check()
        self.source.budget.sizes("train", list(self.plan.columns))

    def reversed_steps(self, stop: int, settings: PassSettings) -> Iterator[ReverseStep]:
        """The steps below `stop`, last first."""
        for number, moments in self.reversed_states(stop):
            line = self.plan.trajectory.lines[number]
            order = np.argsort(line.examples, kind="stable")
            if not len(order) and moments is None:
                continue
            weights_B = torch.from_numpy(self.plan.trajectory.weights(number)[order]).to(
                self.source.device, settings.dtype
            )
            examples = line.examples[order]
            parts = self.curvature.parts(examples, weights_B, settings.quantities)
            batch = ExactBatch(parts, settings.dtype, settings.by_parameter)
            updates = self.plan.updates(number, moments)
            checkpoint = self.plan.segment_at(number).checkpoint.step
            yield ReverseStep(number, checkpoint, examples, weights_B, batch, updates, line.clip)

    def reversed_states(self, stop: int) -> Iterator[tuple[int, dict[str, Moments] | None]]:
        """The steps below `stop`, last first, with Adam's state before each; None for SGD.

        The model has the parameters of the step with --replay, else of the checkpoint before it.
        """
        if self.replay:
            replayed = ReplayedSteps(self.source, self.plan)
            yield from replayed.reversed_states(stop)
            replayed.report_agreement(self.source.reporter)
            return
        for segment in reversed(self.plan.between(self.plan.steps.start, stop)):
            self.source.run.model.at(segment.checkpoint)
            for number in reversed(range(segment.first, segment.stop)):
                yield number, None
