"""What the rows that a command read say about its run: zero losses and gradients, small losses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from influence_cli.cache.gradient_rows import GradientRows

SMALL_LOSS = 1e-5  # float32 keeps few digits of the gradients of smaller losses
Key = tuple[str, int]  # a split, and the step of a checkpoint


@dataclass
class RowCounts:
    """Counts over the rows that were read, of both splits."""

    any_loss: set[str] = field(default_factory=set)  # splits with a loss other than 0
    any_gradient: set[str] = field(default_factory=set)  # splits with a gradient other than 0
    zero_queries: dict[int, bool] = field(default_factory=dict)  # by id: zero at all checkpoints
    small: dict[Key, int] = field(default_factory=dict)  # losses below SMALL_LOSS
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
        if split == "query":
            zero_N = torch.stack([rows.sqnorms[name] == 0 for name in columns]).all(0)
            for query, zero in zip(rows.ids.tolist(), zero_N.tolist(), strict=True):
                self.zero_queries[query] = zero and self.zero_queries.get(query, True)
        key = split, step
        new = rows.ids > self._last.get(key, -1)
        if new.any():
            small = (rows.losses.abs() < SMALL_LOSS).numpy() & new
            self.small[key] = self.small.get(key, 0) + int(small.sum())
            self.read[key] = self.read.get(key, 0) + int(new.sum())
            self._last[key] = max(int(rows.ids[-1]), self._last.get(key, -1))
