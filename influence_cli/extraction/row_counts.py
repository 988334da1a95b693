"""What the rows that a command read say about its run: zero losses and gradients, small losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

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
        """Count rows."""
        if split not in self.any_gradient:
            self.add_gradients(split, any(bool(rows.sqnorms[name].any()) for name in columns))
        squares = torch.stack([rows.sqnorms[name].double() for name in columns]).sum(0)
        if split == "query":
            zero_N = (squares == 0) & ~vanished(rows.losses, squares)
            for query, zero in zip(rows.ids.tolist(), zero_N.tolist(), strict=True):
                self.zero_queries[query] = zero and self.zero_queries.get(query, True)
        self.add_numbers(split, step, rows.ids, rows.losses, squares)

    def add_gradients(self, split: str, any_gradient: bool) -> None:
        """`any_gradient`: whether some gradient is not 0."""
        if any_gradient:
            self.any_gradient.add(split)

    def add_numbers(
        self, split: str, step: int, ids: np.ndarray, losses: Tensor, squares: Tensor
    ) -> None:
        """Count losses (N,), and squared norms (N,) of the gradients; infinite ones are unknown.
        Several passes read the same training examples: the first one counts.
        """
        if split not in self.any_loss and bool(losses.any()):
            self.any_loss.add(split)
        key = split, step
        new = ids > self._last.get(key, -1)
        if new.any():
            small_norms = (squares > 0) & (squares < SMALL_NORM**2)
            add_count(self.small, key, (losses.abs() < SMALL_LOSS).cpu().numpy() & new)
            add_count(self.small_norms, key, small_norms.cpu().numpy() & new)
            add_count(self.vanished, key, vanished(losses, squares).cpu().numpy() & new)
            add_count(self.read, key, new)
            self._last[key] = max(int(ids[-1]), self._last.get(key, -1))


def vanished(losses: Tensor, squares: Tensor) -> Tensor:
    """Mask of the gradients whose squared norms underflow."""
    sizes = losses.abs()
    return (squares < TINY) & (sizes > 0) & (sizes < VANISHING_LOSS)


def add_count(counts: dict[Key, int], key: Key, mask: np.ndarray) -> None:
    counts[key] = counts.get(key, 0) + int(mask.sum())
