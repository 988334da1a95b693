"""The steps of unroll: the gradient and the exact curvature of each step's loss, from the model.

Letters: B entries of a batch.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import DefinitionError, GradientError, InfluenceError
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.curvature import Curvature, LossFunctions
from influence_cli.gradients.curvature_check import check_curvature
from influence_cli.methods.reverse.exact_batch import ExactBatch
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import PassSettings, ReverseStep
from influence_cli.methods.unroll import UnrollOptions
from influence_cli.run.definition import Definition
from influence_cli.run.replay_state import Moments

# Working memory of the directions that go through a batch's curvature at once.
DIRECTION_BYTES = 256 << 20
CHECKED_EXAMPLES = 4  # examples of the check of curvature


class ExactSteps:
    """A StepSource that runs the model: no gradient of a training example is formed or cached.

    Raises DefinitionError where definition.py lacks a function that the curvature needs.
    """

    def __init__(self, source: GradientSource, plan: ReversePlan, options: UnrollOptions) -> None:
        self.source, self.plan, self.replay = source, plan, options.replay
        self.functions = find_loss_functions(source.run.definition, options.curvature)
        self.use_vmap = True  # until a layer does not allow it

    def prepare(self) -> None:
        """Check the curvature, and probe memory before the reverse pass moves the model.

        Raises GradientError where the curvature differs from differences of gradients.
        """
        self.source.run.model.at(self.plan.segments[0].checkpoint)
        self.check()
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
            parts = self.curvature_parts(examples, weights_B, settings.quantities)
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

    def curvature_parts(
        self, ids: np.ndarray, weights_B: Tensor, directions: int
    ) -> list[Callable[[], Curvature]]:
        """Functions that compute the curvature of the batch's loss at the model's parameters.

        One function for each part of the batch that fits into memory.
        """
        budget, columns = self.source.budget, list(self.plan.columns)
        size = budget.batch_size("train", columns)
        example_bytes = budget.sizes("train", columns).working_bytes(columns)
        batch_bytes = example_bytes * min(size, len(ids))
        fitting = max(1, min(directions, DIRECTION_BYTES // max(1, batch_bytes)))
        at_once = fitting if self.use_vmap else 1
        return [
            partial(self.compute_curvature, ids[part], weights_B[part], at_once)
            for part in (slice(first, first + size) for first in range(0, max(1, len(ids)), size))
        ]

    def compute_curvature(self, ids: np.ndarray, weights_B: Tensor, at_once: int) -> Curvature:
        """The curvature of a part of a batch."""
        extractor, model = self.source.extractor, self.source.run.model.module
        batch, _ = extractor.batches.of("train", ids)
        columns = list(self.plan.columns)
        try:
            return Curvature(
                model, columns, self.functions, batch, weights_B, at_once, self.drop_vmap
            )
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise extractor.batches.explained("train", error, len(ids)) from error

    def drop_vmap(self, reason: str) -> None:
        """Use one direction at a time from now on."""
        self.use_vmap = False
        self.source.reporter.note(
            "queries pass each step one at a time, with the same scores but more slowly: vmap "
            f"cannot batch this model ({reason})"
        )

    def check(self) -> None:
        """Compare the curvature of a few examples with differences of gradients.

        It uses a copy of the model in float64. Raises GradientError where they differ; notes where
        the model does not run in float64.
        """
        ids = np.arange(min(CHECKED_EXAMPLES, len(self.source.run.train)))
        try:
            model = copy.deepcopy(self.source.run.model.module).double()
            batch, _ = self.source.extractor.batches.of("train", ids, torch.float64)
            check_curvature(model, list(self.plan.columns), self.functions, batch, len(ids))
        except GradientError:
            raise
        # anything that the model cannot do in float64 or as a copy; the work itself needs neither
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            self.source.reporter.note(
                "the curvature was not compared with differences of gradients: the model does not "
                f"run as a copy in float64 ({reason})"
            )


def find_loss_functions(definition: Definition, curvature: str) -> LossFunctions:
    """The definition's functions that the curvature needs. Raises DefinitionError."""
    needed = ("outputs", "loss_from_outputs") if curvature == "gauss-newton" else ()
    if missing := [name for name in needed if not definition.has(name)]:
        raise DefinitionError(
            f"{definition.path.name} lacks {' and '.join(f'{name}()' for name in missing)}",
            "--curvature gauss-newton needs the loss in two parts: outputs(model, batch) and "
            "loss_from_outputs(outputs, batch)",
            "--curvature hessian needs loss() only",
        )
    return LossFunctions(*map(definition.raw, ("loss", *needed)))
