"""Refuse losses and gradients that are not finite, or that leave the range of a number format."""

import numpy as np
import torch

from influence_cli.errors import GradientError, listed


def check_finite(
    weights: str,
    data: str,
    ids: np.ndarray,
    losses: torch.Tensor,
    sqnorms: dict[str, torch.Tensor],
) -> None:
    """Raise GradientError, naming the example, where a loss or a gradient's norm is not finite."""
    named = {"the loss": losses}
    named |= {f"the gradient of {column}": norms for column, norms in sqnorms.items()}
    for name, values in named.items():
        wrong = ids[~torch.isfinite(values).cpu().numpy()]
        if len(wrong):
            raise GradientError(
                f"{name} is not finite at {weights}, example {wrong[0]} of {data}",
                f"{len(wrong)} of the {len(ids)} examples of its batch: {listed(wrong)}",
                "look at that example and the loss; --precision float64 helps against overflow;"
                " --steps or --train leaves it out",
            )


def check_storable(
    weights: str, data: str, store: torch.dtype, sqnorms: dict[str, torch.Tensor]
) -> None:
    """Raise GradientError where float64 gradients leave the range of a narrower store: all are too
    small, or one is too large. Every narrower store has the range of float32.
    """
    limits = torch.finfo(torch.float32)
    largest = max(float(norms.max()) for norms in sqnorms.values()) ** 0.5
    if store != torch.float64 and (0 < largest < limits.tiny * 100 or largest > limits.max / 100):
        raise GradientError(
            f"gradients of {data} at {weights} do not fit into --store "
            f"{str(store).removeprefix('torch.')}: the largest norm is {largest:.3g}",
            f"expected: between {limits.tiny * 100:.3g} and {limits.max / 100:.3g}",
            "--store float64, or --cache none; look for a loss that is scaled",
        )
