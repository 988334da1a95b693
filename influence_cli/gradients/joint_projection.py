"""One random projection of the gradients of all parameters together.

P g = sum over parameters c of S_c P_c g_c

P_c projects the gradient of one parameter to at most K numbers (projection.py). S_c gives these
numbers random signs, and places of their own among the K. So E[P^T P] = 1. Where all parameters
have at most K numbers together, P puts them side by side and loses nothing.

Letters: N examples, K projected numbers.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import Dense, Form
from influence_cli.gradients.projection import Projection
from influence_cli.gradients.random_tables import Tables


@dataclass(frozen=True)
class JointProjection:
    """`numbers`: K. `projection`: of each parameter. `places`: places among the K and signs."""

    numbers: int
    projection: Projection
    places: Mapping[str, tuple[Tensor, Tensor]]

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, Sequence[int]],
        projection: Projection | None,
        numbers: int,
        seed: int,
    ) -> "JointProjection":
        """Of the parameters with these shapes, to at most K numbers. `projection`: of gradients
        that are projected already. None: they are exact, `numbers` is K, and `seed` is of P.
        """
        projection = projection or Projection("tensor-sketch", numbers, seed)
        widths = {name: projection.width(shape) for name, shape in shapes.items()}
        if sum(map(math.prod, shapes.values())) <= projection.numbers:
            return cls(sum(widths.values()), projection, side_by_side(widths))
        places = {}
        for name, width in widths.items():
            sides = 1, projection.numbers  # the tables below do not depend on them
            tables = Tables(projection.seed, name, *sides, torch.device("cpu"), torch.float64)
            order = torch.from_numpy(tables.order("joined", projection.numbers))
            places[name] = order[:width], tables.signs("joined", width)
        return cls(projection.numbers, projection, places)

    def features(self, forms: Mapping[str, Form], names: Iterable[str] | None = None) -> Tensor:
        """(N, K) float64, of exact or projected gradients of these parameters (default: all).

        On the CPU, or on a CUDA device where the forms are.
        """
        features_NK = None
        for name in self.places if names is None else names:
            form, (at, signs) = forms[name], self.places[name]
            if not isinstance(form, Dense) or form.values.shape[1] != len(at):  # exact gradients
                form = self.projection(name, form)[1]
            values = form.dense().values
            values = (values if values.is_cuda else values.cpu()).double()
            if features_NK is None:
                features_NK = values.new_zeros(len(values), self.numbers)
            features_NK[:, at.to(values.device)] += values * signs.to(values.device)
        assert features_NK is not None
        return features_NK


def side_by_side(widths: Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
    """Places one after the other, without signs."""
    places, first = {}, 0
    for name, width in widths.items():
        ones = torch.ones(width, dtype=torch.float64)
        places[name] = torch.arange(first, first + width), ones
        first += width
    return places
