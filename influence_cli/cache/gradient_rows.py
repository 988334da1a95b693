"""Gradients of some examples at one checkpoint, in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.gradients.form_ops import concat
from influence_cli.gradients.forms import Form


@dataclass(frozen=True)
class GradientRows:
    """Rows of N examples: ids, losses, item digests, and per column squared norms and gradients.

    `ids`: (N,) int64. `losses`: (N,) float64. `digests`: (N,) int64. `sqnorms`: (N,) float64 per
    column. `forms`: N rows per column; empty where only norms were requested.
    """

    ids: np.ndarray
    losses: Tensor
    digests: Tensor
    sqnorms: dict[str, Tensor]
    forms: dict[str, Form]

    def parts(self, size: int) -> "Iterator[GradientRows]":
        """The rows in parts of `size`, as views of the same memory where the form allows it."""
        for first in range(0, len(self.ids), size):
            at = slice(first, first + size)
            norms = {name: value[at] for name, value in self.sqnorms.items()}
            forms = {name: form.part(at) for name, form in self.forms.items()}
            yield GradientRows(self.ids[at], self.losses[at], self.digests[at], norms, forms)

    def take(self, index: np.ndarray) -> "GradientRows":
        """Copies of the rows at these positions."""
        at = torch.from_numpy(index)
        norms = {name: value[at] for name, value in self.sqnorms.items()}
        forms = {name: form.take(at) for name, form in self.forms.items()}
        return GradientRows(self.ids[index], self.losses[at], self.digests[at], norms, forms)


def concat_rows(parts: Sequence[GradientRows]) -> GradientRows:
    """Rows of the same columns, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    return GradientRows(
        np.concatenate([part.ids for part in parts]),
        torch.cat([part.losses for part in parts]),
        torch.cat([part.digests for part in parts]),
        {name: torch.cat([part.sqnorms[name] for part in parts]) for name in first.sqnorms},
        {name: concat([part.forms[name] for part in parts]) for name in first.forms},
    )
