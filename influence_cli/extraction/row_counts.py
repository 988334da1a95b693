"""What the rows that a command read say about its run: zero losses and gradients, small losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows

SMALL_LOSS = 1e-5  # float32 keeps few digits of the gradients of smaller losses
# (float32) of smaller gradients some numbers are subnormal, with few digits
SMALL_NORM = 1e-33
# (float64) losses whose gradients may be below 1e-154, so that their squares are 0
VANISHING_LOSS = 1e-140
TINY = torch.finfo(torch.float64).tiny
Key = tuple[str, int]  # a split, and the step of a checkpoint


@dataclass
class RowCounts:
    """Counts over the rows that were read, of both splits."""

    any_loss: set[str] = field(default_factory=set)  # splits with a loss other than 0
    any_gradient: set[str] = field(default_factory=set)  # splits with a gradient other than 0
    zero_queries: dict[int, bool] = field(default_factory=dict)  # by id: zero at all checkpoints
    small: dict[Key, int] = field(default_factory=dict)  # losses below SMALL_LOSS
    small_norms: dict[Key, int] = field(default_factory=dict)  # gradients below SMALL_NORM, not 0
    vanished: dict[Key, int] = field(default_factory=dict)  # gradients whose squares underflow
    read: dict[Key, int] = field(default_factory=dict)  # examples
    _last: dict[Key, int] = field(default_factory=dict)  # the highest id that was counted

    def add(self, split: str, step: int, columns: Sequence[str], rows: GradientRows) -> None:
        """Count rows. Several passes read the same training examples: the first one counts."""
        if split not in self.any_loss and bool(rows.losses.any()):
            self.any_loss.add(split)
        if split not in self.any_gradient and any(
            bool(rows.sqnorms[name].any()) for name in columns
        ):
            self.any_gradient.add(split)
        sizes = rows.losses.abs()
        squares = torch.stack([rows.sqnorms[name].double() for name in columns]).sum(0)
        vanished = (squares < TINY) & (sizes > 0) & (sizes < VANISHING_LOSS)
        if split == "query":
            zero_N = (squares == 0) & ~vanished
            for query, zero in zip(rows.ids.tolist(), zero_N.tolist(), strict=True):
                self.zero_queries[query] = zero and self.zero_queries.get(query, True)
        key = split, step
        new = rows.ids > self._last.get(key, -1)
        if new.any():
            small_norms = (squares > 0) & (squares < SMALL_NORM**2)
            add_count(self.small, key, (sizes < SMALL_LOSS).numpy() & new)
            add_count(self.small_norms, key, small_norms.numpy() & new)
            add_count(self.vanished, key, vanished.numpy() & new)
            add_count(self.read, key, new)
            self._last[key] = max(int(rows.ids[-1]), self._last.get(key, -1))


def add_count(counts: dict[Key, int], key: Key, mask: np.ndarray) -> None:
    counts[key] = counts.get(key, 0) + int(mask.sum())
