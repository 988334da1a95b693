"""The recorded steps in reverse order, and the effects that come from each.

A method supplies the steps (StepSource): dve with the empirical Fisher (fisher_steps.py), unroll
with exact curvature (exact_steps.py). `propagate` is the same for both.

Letters: B entries of a batch, K quantities of the final model.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import is_too_large
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint, StepBatch, Update
from influence_cli.methods.reverse.removal_effects import removal_effects, sum_parameters
from influence_cli.methods.reverse.stability import (
    check_finite,
    check_growth,
    not_finite,
    state_norms,
)


@dataclass(frozen=True)
class PassSettings:
    """What a reverse pass propagates: the number of quantities K, their precision.

    `by_parameter`: the products g(z).u are needed for each parameter, not only their sum.
    """

    quantities: int
    dtype: torch.dtype
    by_parameter: bool = False


@dataclass(frozen=True)
class ReverseStep:
    """One step: its batch, with gradients and curvature, and the optimizer's rules."""

    number: int
    checkpoint: int  # step of the checkpoint before it
    examples: np.ndarray  # (B,) rising
    weights: Tensor  # (B,)
    batch: StepBatch
    updates: dict[str, Update]
    clip: float


@dataclass(frozen=True)
class StepEffects:
    """(B, K) the effect of leaving each entry out of a step.

    `values`: per layer, or summed under the name "".
    """

    step: int
    checkpoint: int  # step of the checkpoint before it
    examples: np.ndarray  # (B,)
    values: dict[str, Tensor]

    def times(self, scale_K: Tensor) -> "StepEffects":
        """The effects times a factor of each quantity, in float64 on the CPU."""
        values = {name: value.cpu().double() * scale_K for name, value in self.values.items()}
        return dataclasses.replace(self, values=values)


class StepSource(Protocol):
    """Where the steps of a reverse pass come from."""

    def reversed_steps(self, stop: int, settings: PassSettings) -> Iterator[ReverseStep]:
        """The steps below `stop`, last first."""

    def end_statistics(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The derivatives by BatchNorm's running statistics at the end (running_statistics.py)."""


def propagate(
    steps: Iterable[ReverseStep],
    adjoint: Adjoint,
    start_norms: Tensor,
    renormalize: bool,
    layers: Mapping[str, Sequence[str]],
) -> Iterator[StepEffects]:
    """Move the adjoint back over the steps, last first, and yield the effects of each.

    `start_norms` (K,): the norms of the adjoint at the end of training. `layers`: the parameters of
    each layer, to split the effects; empty for their sum.

    Raises GradientError where the adjoint diverges or a number is not finite.
    """
    for step in steps:
        try:
            products = adjoint.reverse_step(step.batch, step.updates, step.clip)
        except RuntimeError as error:
            if is_too_large(error):
                raise not_finite(step.number, step.checkpoint) from error
            raise
        norms = state_norms(adjoint)
        check_finite(norms, step.number, step.checkpoint)
        check_growth(start_norms, norms, step.number)
        example_of = None
        if renormalize:
            numbers = np.unique(step.examples, return_inverse=True)[1]
            example_of = torch.from_numpy(numbers).to(step.weights.device)
        values = {
            layer: removal_effects(sum_parameters(selected), step.weights, example_of)
            for layer, selected in split_products(products, layers).items()
        }
        for value in values.values():
            check_finite(value, step.number, step.checkpoint)
        yield StepEffects(step.number, step.checkpoint, step.examples, values)


def split_products(
    products: Mapping[str, Tensor], layers: Mapping[str, Sequence[str]]
) -> dict[str, Mapping[str, Tensor]]:
    """The products of each layer's parameters; without layers all, under the name ""."""
    if not layers:
        return {"": products}
    # of a parameter that the step's loss does not depend on
    zeros = torch.zeros_like(next(iter(products.values())))
    return {
        layer: {name: products.get(name, zeros) for name in names}
        for layer, names in layers.items()
    }


def step_slices(steps: np.ndarray) -> Iterator[tuple[int, slice]]:
    """Each step with its rows, of rows that are sorted by falling step."""
    distinct, starts = np.unique(-steps, return_index=True)
    for step, first, stop in zip(-distinct, starts, [*starts[1:], len(steps)], strict=True):
        yield int(step), slice(int(first), int(stop))
