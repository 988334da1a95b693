"""Products with the exact curvature of the mean training loss, all selected parameters together.

Letters: K directions, P numbers of all parameters together.
"""

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from influence_cli.extraction.batch_curvature import BatchCurvature
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.curvature import Curvature
from influence_cli.gradients.forms import Form
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.parameters import Column

KEPT_BYTES = 384 << 20  # working memory of batches that stay between products
BLOCK_BYTES = 1 << 30  # of the vectors of a solver
VECTORS_OF_SOLVER = 8  # of float64 that a solver holds for each right-hand side
MOST_ROWS = 64  # right-hand sides of a block


class TrainingCurvature:
    """H at one checkpoint: the mean over all training examples, in float64 sums.

    Raises DefinitionError where definition.py lacks a function that the curvature needs, and
    GradientError where the curvature differs from differences of gradients.
    """

    def __init__(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        columns: Mapping[str, Column],
        curvature: str,
    ) -> None:
        """`curvature`: hessian or gauss-newton."""
        self.source, self.checkpoint, self.columns = source, checkpoint, columns
        self.curvature = curvature
        # not every device has float64
        self.place = source.device if source.device.type == "cuda" else torch.device("cpu")
        self.places: dict[str, slice] = {}
        self.size = 0  # P
        for name, column in columns.items():
            self.places[name] = slice(self.size, self.size + column.numel)
            self.size += column.numel
        self._batches = BatchCurvature(source, list(columns), curvature)
        self._parts: list[Callable[[], Curvature]] = []
        self._is_checked = False

    @property
    def rows_at_once(self) -> int:
        """Right-hand sides of a block."""
        return max(1, min(MOST_ROWS, BLOCK_BYTES // self.solver_bytes(1)))

    def solver_bytes(self, rows: int) -> int:
        """Memory of a solver's vectors."""
        return 8 * VECTORS_OF_SOLVER * rows * self.size

    def parts(self) -> list[Callable[[], Curvature]]:
        """The curvature of each batch. It is computed once where all batches fit into memory."""
        self.source.run.model.at(self.checkpoint)
        if self._parts:
            return self._parts
        if not self._is_checked:
            self._batches.check()
            self._is_checked = True
        parts = self._batches.parts_of_all(self.rows_at_once)
        columns = list(self.columns)
        example_bytes = self.source.budget.sizes("train", columns).working_bytes(columns)
        fits = len(self.source.run.train) * example_bytes <= KEPT_BYTES
        self._parts = [functools.cache(part) for part in parts] if fits else parts
        return self._parts

    def release(self) -> None:
        """Forget the batches: they are of the weights that the model holds now."""
        self._parts = []

    def product(self, u_KP: Tensor) -> Tensor:
        """(K, P) float64: H times each row."""
        dtype, device = self.source.settings.precision, self.source.device
        u = {name: u_KP[:, at].to(device, dtype) for name, at in self.places.items()}
        total_KP = torch.zeros_like(u_KP)
        for compute in self.parts():
            _, curved = compute().through(u)
            for name, value_KD in curved.items():
                total_KP[:, self.places[name]] += value_KD.to(self.place, torch.float64)
        return total_KP.div_(len(self.source.run.train))

    def join(self, forms: Mapping[str, Form]) -> Tensor:
        """(K, P) float64: the gradients of all parameters side by side."""
        values = [forms[name].dense().values for name in self.places]
        return torch.cat([value.to(self.place, torch.float64) for value in values], dim=1)
