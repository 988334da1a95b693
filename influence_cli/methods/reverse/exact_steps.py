"""The steps of unroll: the gradient and the exact curvature of each step's loss, from the model.

Letters: B entries of a batch.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import GradientError
from influence_cli.extraction.batch_curvature import BatchCurvature
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.exact_batch import ExactBatch
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.running_statistics import find_running_statistics
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import PassSettings, ReverseStep
from influence_cli.methods.unroll import UnrollOptions
from influence_cli.run.replay import Replay
from influence_cli.run.replay_state import Moments, total_norm

MASK_ERROR = 1e-2  # largest relative difference of two gradients that rounding explains


class ExactSteps:
    """A StepSource that runs the model: no gradient of a training example is formed or cached.

    Raises DefinitionError where definition.py lacks a function that the curvature needs.
    """

    def __init__(self, source: GradientSource, plan: ReversePlan, options: UnrollOptions) -> None:
        self.source, self.plan, self.replay = source, plan, options.replay
        self.curvature = BatchCurvature(source, list(plan.columns), options.curvature)
        self.has_checked_masks = False
        self.running, self.other_layers = find_running_statistics(source, plan)

    def prepare(self) -> None:
        """Check the curvature, and probe memory before the reverse pass moves the model.

        Raises GradientError where the curvature differs from differences of gradients.
        """
        self.source.run.model.at(self.plan.segments[0].checkpoint)
        self.curvature.check()
        self.source.budget.sizes("train", list(self.plan.columns))

    def end_statistics(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The derivatives of the queries by running statistics, at the end of training."""
        if not self.running.momenta:
            return {}
        self.source.run.model.at(self.plan.end)
        return self.running.at_the_end(self.source, gradients)

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
            batch = self.build_batch(number, order, weights_B, settings)
            updates = self.plan.updates(number, moments)
            checkpoint = self.plan.segment_at(number).checkpoint.step
            yield ReverseStep(number, checkpoint, examples, weights_B, batch, updates, line.clip)

    def build_batch(
        self, number: int, order: np.ndarray, weights_B: Tensor, settings: PassSettings
    ) -> ExactBatch:
        """The batch of a step, with its entries in this order; `weights_B`: theirs.

        Raises GradientError where a second derivative draws other masks than training.
        """
        line = self.plan.trajectory.lines[number]
        if line.training is None:
            parts = self.curvature.parts(line.examples[order], weights_B, settings.quantities)
            return ExactBatch(parts, settings.dtype, settings.by_parameter)
        recorded_B = torch.empty_like(weights_B)
        places = torch.from_numpy(order).to(weights_B.device)
        recorded_B[places] = weights_B
        parts = self.curvature.parts_as_trained(
            line.training, line.examples, recorded_B, settings.quantities
        )
        batch = ExactBatch(parts, settings.dtype, settings.by_parameter, places, self.running)
        if not self.has_checked_masks:
            self.check_masks(number, batch)
            self.has_checked_masks = True
        return batch

    def check_masks(self, number: int, batch: ExactBatch) -> None:
        """Compare the gradient of a step with that of a replay, which uses the kernels of training.

        Raises GradientError where they differ.
        """
        replay = Replay(
            self.source.run, lambda ids: self.source.extractor.batches.of("train", ids)[0]
        )
        replayed = dict(zip(replay.names, replay.gradient(number), strict=True))
        own = batch.gradient()
        difference = total_norm(own[name] - replayed[name].flatten() for name in own)
        size = total_norm(replayed[name] for name in own)
        if not difference <= MASK_ERROR * size:
            raise GradientError(
                f"step {number:,}: a second derivative draws other dropout masks than training did",
                f"relative difference of the gradients: {difference / (size or 1):.2g} "
                f"(limit {MASK_ERROR})",
                "fused attention with dropout has no second derivative, and other kernels draw "
                "other masks",
                "train with plain attention (transformers: attn_implementation='eager'), or use "
                "--method dve",
            )

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
