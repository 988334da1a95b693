"""A step's batch by the exact derivatives of its own loss.

Letters: B entries of a batch, D numbers of a parameter, K quantities of the final model.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from influence_cli.gradients.curvature import Curvature
from influence_cli.methods.reverse.optimizer_adjoint import AddCurvature
from influence_cli.methods.reverse.running_statistics import NO_STATISTICS, RunningStatistics


class ExactBatch:
    """A StepBatch with the Hessian or the Gauss-Newton matrix of the step's loss.

    `parts`: functions that compute the curvature of each part of the batch, in order. A single
    part is computed once, several parts at each use. `by_parameter`: products for each parameter,
    each with a pass of its own; else their sum. `order` (B,): the entries of the products, as
    positions in the parts; None: the order of the parts. `running`: statistics that its forward
    passes changed.
    """

    def __init__(
        self,
        parts: Sequence[Callable[[], Curvature]],
        dtype: torch.dtype,
        by_parameter: bool,
        order: Tensor | None = None,
        running: RunningStatistics = NO_STATISTICS,
    ) -> None:
        self._order, self._running = order, running
        only = parts[0]() if len(parts) == 1 else None
        self._parts = parts if only is None else [lambda: only]
        self._dtype, self._by_parameter = dtype, by_parameter
        self._gradient: dict[str, Tensor] = {}
        for compute in self._parts:
            add_values(self._gradient, compute().gradient(), dtype)

    @property
    def names(self) -> Collection[str]:
        return self._gradient.keys()

    def gradient(self) -> Mapping[str, Tensor]:
        return self._gradient

    def through(
        self, u: Mapping[str, Tensor], scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], AddCurvature]:
        scaled = {
            name: value if scale[name] == 1 else value * scale[name] for name, value in u.items()
        }
        products: list[dict[str, Tensor]] = []  # of each part
        curved: dict[str, Tensor] = {}  # H (scale u) of the whole batch
        for compute in self._parts:
            products_of_part, curved_part = compute().through(scaled, self._by_parameter)
            products.append(products_of_part)
            add_values(curved, curved_part, self._dtype)

        def add_curvature(name: str, theta: Tensor) -> None:
            theta.add_(curved[name])

        joined = concat_products(products)
        if self._order is not None:
            joined = {name: value[self._order] for name, value in joined.items()}
        return {name: value.to(self._dtype) for name, value in joined.items()}, add_curvature

    def add_statistics(
        self,
        theta: Mapping[str, Tensor],
        a_s: Mapping[str, Tensor],
    ) -> None:
        """Adds to a_theta what comes through running statistics, and moves a_s before the step."""
        running = self._running
        vectors = running.call_vectors(a_s, len(self._parts))
        for number, compute in enumerate(self._parts):
            some = {name: values[number] for name, values in vectors.items()}
            for name, value in compute().pull_statistics(some).items():
                theta[name].add_(value.to(self._dtype))
        running.move_back(a_s, len(self._parts))


def add_values(sums: dict[str, Tensor], values: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Add to sums by name, in a precision."""
    for name, value in values.items():
        sums[name] = sums[name] + value.to(dtype) if name in sums else value.to(dtype)


def concat_products(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The (B, K) products of a batch from those of its parts; zeros where a part lacks a name."""
    zero = torch.zeros_like(next(iter(parts[0].values())))
    joined = {}
    for name in dict.fromkeys(name for products in parts for name in products):
        values = []
        for products in parts:
            count = len(next(iter(products.values())))
            values.append(products.get(name, zero[:count]))
        joined[name] = torch.cat(values)
    return joined
