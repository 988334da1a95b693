"""What a check reports, and which examples and checkpoints it looks at."""

from dataclasses import dataclass

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
