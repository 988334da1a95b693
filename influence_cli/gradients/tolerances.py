"""When two ways to compute one number agree."""

from collections.abc import Mapping

import torch
from torch import Tensor


def rounding(dtype: torch.dtype) -> float:
    """The relative distance that rounding may cause: the square root of the precision, or 8 units
    of half precisions.
    """
    eps = torch.finfo(dtype).eps
    return eps**0.5 if eps < 1e-6 else 8 * eps


def close(computed: Tensor, expected: Tensor) -> bool:
    """Whether all numbers are equal within rounding."""
    eps = rounding(expected.dtype)
    return torch.allclose(computed, expected, rtol=eps, atol=eps)


def differing(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The parameters of `computed` whose gradients differ from those of `expected` by more than
    rounding, relative to the parameter's largest number.

    A gradient that is zero up to rounding (an attention key's bias) is noise. So a small part of
    the largest number of all parameters is allowed, too.
    """
    scales = {
        name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()
    }
    largest = max(scales.values(), default=0.0)
    allowed = {
        name: max(
            rounding(value.dtype) * scales[name], torch.finfo(value.dtype).eps ** 0.75 * largest
        )
        for name, value in computed.items()
    }
    return [
        name
        for name, value in computed.items()
        if not bool(((value - expected[name]).abs() <= allowed[name]).all())
    ]
