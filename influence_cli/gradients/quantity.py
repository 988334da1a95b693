"""The quantity whose gradients are captured: the user's loss or measure, one number per example."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError
from influence_cli.gradients.batches import Batch

# (model, batch) -> (B,), smaller is better
Quantity = Callable[[nn.Module, Batch], Tensor]


class LossCountError(GradientError):
    """Other than one loss per example."""


def checked(name: str, losses: Any, size: int, traced: bool = False) -> Tensor:
    """`losses` (B,), as the user's function `name` returned it for a batch of `size`.

    `traced`: inside torch.func, where tensors do not say whether they require gradients. Raises
    GradientError unless it is one differentiable number per example.
    """
    expected = f"expected: a tensor of shape ({size},), one unreduced loss per example of the batch"
    if not isinstance(losses, Tensor):
        raise GradientError(f"{name} returned a {type(losses).__name__}", expected)
    if losses.ndim == 0:
        raise GradientError(
            f"{name} returned a scalar", expected, "for torch's losses: reduction='none'"
        )
    if tuple(losses.shape) != (size,):
        raise LossCountError(
            f"{name} returned shape {tuple(losses.shape)} for a batch of {size}",
            expected,
            "sum or average over positions, never over examples: .mean(1), .flatten(1).sum(1)",
        )
    if not losses.is_floating_point():
        raise GradientError(f"{name} returned {losses.dtype}", expected)
    if not traced and not losses.requires_grad:
        raise GradientError(
            f"{name} returned a tensor that is not differentiable",
            "expected: a tensor that depends on the model's trained parameters",
            "look for torch.no_grad(), .detach(), .item(), .argmax() or another model than the one "
            "passed in",
        )
    return losses


@contextmanager
def frozen(model: nn.Module, trained: Sequence[str] = ()) -> Iterator[None]:
    """Record no graph for any parameter except `trained`."""
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in set(trained)
    ]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        with plain_attention():
            yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Switch off attention's fused inference path, which layer rules can't see, and vmap's warning
    about slow operations.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="There is a performance drop because we have not yet implemented"
            )
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
