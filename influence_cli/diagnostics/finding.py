"""What a check reports, and which examples and checkpoints it looks at."""

from dataclasses import dataclass

import numpy as np

EXAMPLES = 8  # examples of each split that a check computes gradients for
CHECKPOINTS = 3  # checkpoints that a check looks at


@dataclass(frozen=True)
class Finding:
    """One check of one subject: a parameter, or a part of the cache.

    `error`: the worst relative error. `allowed`: the rounding error that is allowed.
    """

    check: str
    split: str
    subject: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for nan


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 to `count` - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
