"""Random projections of per-example gradients: K numbers per parameter, whose inner products are
those of the gradients in expectation.

Each kind is a linear map P with E[P^T P] = 1 (projection_kinds.py). A parameter with at most K
numbers keeps its exact gradients.

Letters: N examples, K projected numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_cli.gradients.forms import Form, Projected
from influence_cli.gradients.projection_kinds import KINDS
from influence_cli.gradients.projection_map import ProjectionMap
from influence_cli.gradients.random_tables import Tables
from influence_cli.gradients.row_products import HALVES


@dataclass(frozen=True)
class Projection:
    """`--project numbers --projection kind --seed seed`. All checkpoints, splits and devices share
    the maps.
    """

    kind: str
    numbers: int
    seed: int = 0
    _maps: dict[tuple[str, torch.device, torch.dtype], ProjectionMap] = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def key(self) -> str:
        """Its part of a cache folder's name."""
        return f"{self.kind}-{self.numbers}-seed-{self.seed}"

    def width(self, shape: Sequence[int]) -> int:
        """Numbers of one example's projected gradient, for a parameter of `shape`."""
        return min(self.numbers, math.prod(shape))

    def spread(self, shape: Sequence[int]) -> float:
        """An upper bound of the standard deviation of an inner product, in units of both norms.

        Gradients of rank one reach it (tensor sketches: (3^p - 1) / K at p = 2, Pham & Pagh 2013).
        """
        if math.prod(shape) <= self.numbers:
            return 0.0
        root = math.sqrt(self.numbers)
        variance = {
            "tensor-sketch": 8 / self.numbers,
            "sparse": 2 / self.numbers,
            "khatri-rao": 9 / self.numbers,
        }
        return math.sqrt(variance.get(self.kind, (1 + 2 / root) ** 2 - 1))

    def __call__(self, name: str, form: Form) -> tuple[Tensor, Form]:
        """Exact squared norms (N,) and projected gradients (N, K) of the parameter `name`."""
        if math.prod(form.shape) <= self.numbers:
            exact = form.dense()
            return exact.sqnorm(), Projected(form.shape, exact.values)
        form = form.to(form.device, torch.float32) if form.dtype in HALVES else form
        key = name, form.device, form.dtype
        if key not in self._maps:
            tables = Tables(self.seed, name, *matrix_shape(form.shape), *key[1:])
            self._maps[key] = KINDS[self.kind](tables, self.numbers)
        norms, values = self._maps[key].project(form)
        return norms, Projected(form.shape, values)


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter as a matrix, the sides of its factors. A vector is one
    row.
    """
    if len(shape) == 2:
        return shape[0], shape[1]
    wide = [n for n in shape if n != 1] or [1]
    return (wide[0], math.prod(wide[1:])) if len(wide) > 1 else (1, wide[0])
