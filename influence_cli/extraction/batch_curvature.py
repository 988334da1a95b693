"""The exact curvature of batches of training examples, at the parameters that the model holds.

Letters: B examples of a batch.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import DefinitionError, GradientError, InfluenceError
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.curvature import Curvature, LossFunctions
from influence_cli.gradients.curvature_check import check_curvature
from influence_cli.run.definition import Definition
from influence_cli.run.training_mode import TrainingMode, run_as_trained

# Working memory of the directions that go through a batch's curvature at once.
DIRECTION_BYTES = 256 << 20
CHECKED_EXAMPLES = 4  # examples of the check of curvature


class BatchCurvature:
    """Computes the curvature of training batches, part by part as memory allows.

    `curvature`: hessian or gauss-newton. Raises DefinitionError where definition.py lacks a
    function that it needs.
    """

    def __init__(self, source: GradientSource, columns: Sequence[str], curvature: str) -> None:
        self.source, self.columns = source, list(columns)
        self.functions = find_loss_functions(source.run.definition, curvature)
        self.use_vmap = True  # until a layer does not allow it

    def parts(
        self, ids: np.ndarray, weights_B: Tensor, directions: int
    ) -> list[Callable[[], Curvature]]:
        """Functions that compute the curvature of the weighted loss of a batch.

        One function for each part of the batch that fits into memory.
        """
        size = self.source.budget.batch_size("train", self.columns)
        at_once = self._directions_at_once(min(size, len(ids)), directions)
        return [
            partial(self.compute, ids[part], weights_B[part], at_once)
            for part in (slice(first, first + size) for first in range(0, max(1, len(ids)), size))
        ]

    def parts_as_trained(
        self, mode: TrainingMode, ids: np.ndarray, weights_B: Tensor, directions: int
    ) -> list[Callable[[], Curvature]]:
        """The same for the recorded micro-batches of a step, with the masks of training.

        `ids`: in the recorded order.
        """
        at_once = self._directions_at_once(max(mode.sizes), directions)
        model = self.source.run.model.module

        def compute(part: slice, seed: int) -> Curvature:
            with run_as_trained(model, seed, mode.eval_modules):
                return self.compute(ids[part], weights_B[part], at_once)

        return [partial(compute, part, seed) for part, seed in mode.micro_batches()]

    def _directions_at_once(self, examples: int, directions: int) -> int:
        """How many directions fit into DIRECTION_BYTES beside each other."""
        example_bytes = self.source.budget.sizes("train", self.columns).working_bytes(self.columns)
        return max(1, min(directions, DIRECTION_BYTES // max(1, example_bytes * examples)))

    def parts_of_all(self, directions: int) -> list[Callable[[], Curvature]]:
        """The same for all training examples, with weights of 1."""
        source = self.source
        count = len(source.run.train)
        ones_N = torch.ones(count, dtype=source.settings.precision, device=source.device)
        return self.parts(np.arange(count), ones_N, directions)

    def compute(self, ids: np.ndarray, weights_B: Tensor, at_once: int) -> Curvature:
        """The curvature of a part of a batch."""
        batches, model = self.source.extractor.batches, self.source.run.model.module
        batch, _ = batches.of("train", ids)
        at_once = at_once if self.use_vmap else 1
        try:
            return Curvature(
                model, self.columns, self.functions, batch, weights_B, at_once, self.drop_vmap
            )
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise batches.explained("train", error, len(ids)) from error

    def drop_vmap(self, reason: str) -> None:
        """Use one direction at a time from now on."""
        self.use_vmap = False
        self.source.reporter.note(
            "queries pass each batch one at a time, with the same scores but more slowly: vmap "
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
            check_curvature(model, self.columns, self.functions, batch, len(ids))
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
