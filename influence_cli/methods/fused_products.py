"""Scores of a block of training examples, computed while their gradients are captured.

As the gradients of a layer arrive in the backward pass, they are multiplied with the queries'
gradients of that layer and dropped. The scores are those of cached gradients, within the rounding
of another order of sums.

Letters: B examples of a batch, N train, Q query, P parts of a score.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from influence_cli.extraction.number_checks import check_finite
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.gradients.row_products import Memo
from influence_cli.methods.products import ScaledQueries, inverse_of_norms, products_in_range
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint


@dataclass(frozen=True)
class ColumnProducts:
    """Of one column: products (B, Q), and squared norms (B,) of the gradients: infinite where they
    are not known, NaN where a gradient is not finite. None: no norm is known.
    """

    scores_BQ: Tensor
    sqnorms: Tensor | None


@dataclass(frozen=True)
class FusedProducts:
    """The products at one checkpoint.

    `queries`: by column, on the device. `counts`: by column its weight and the number of its part
    (0: none). `inverse_Q`: of the queries' norms, for cosines; else None. `shape`: 1 + P, Q, N.
    """

    source: GradientSource
    checkpoint: Checkpoint
    queries: Mapping[str, ScaledQueries]
    counts: Mapping[str, tuple[float, int]]
    inverse_Q: Tensor | None
    shape: tuple[int, int, int]
    _memo: Memo = field(default_factory=dict)

    def scores(
        self, columns: Sequence[str], ids: np.ndarray, advance: Advance, where: str
    ) -> tuple[Tensor, bool]:
        """(1 + P, Q, N) float64, and whether any product is not 0. Raises GradientError: a loss
        or a gradient that is not finite.
        """
        device = self.source.device
        # Products are added in float64, which MPS lacks.
        place = device if device.type == "cuda" else torch.device("cpu")
        totals_PQN = torch.zeros(self.shape, dtype=torch.float64, device=place)
        any_product = False

        def take(visited: tuple[slice, Tensor, dict[str, ColumnProducts]]) -> None:
            nonlocal any_product
            at, losses, results = visited
            self._memo.clear()
            self._check(ids[at], results)
            batch_PQB = totals_PQN[:, :, at].zero_()
            for name in columns:  # in the same order as for cached gradients
                weight, part = self.counts[name]
                scores_QB = results[name].scores_BQ.T.to(place)
                any_product = any_product or bool(scores_QB.any())
                for index in {0, part}:
                    batch_PQB[index].add_(scores_QB, alpha=weight)
            if self.inverse_Q is not None:
                batch_PQB *= self.inverse_Q.to(place)[:, None] * self._inverse_norms(results).to(
                    place
                )
            squares = torch.stack([sqnorms_of(results[name]) for name in columns]).sum(0)
            step = self.checkpoint.step
            self.source.counts.add_numbers("train", step, ids[at], losses.cpu(), squares)

        self.source.extractor.visit_at(
            self.checkpoint, "train", columns, ids, self._multiply, take, advance, where
        )
        self.source.counts.add_gradients("train", any_product)
        return totals_PQN, any_product

    def _multiply(self, name: str, form: Form) -> ColumnProducts:
        projection = self.source.settings.projection
        exact = None
        if projection:
            exact, form = projection(name, form)
        elif self.inverse_Q is not None:
            exact = form.sqnorm()
        scores_BQ, sqnorms = products_in_range(
            form, self.queries[name], self.source.device, self._memo
        )
        if exact is not None:
            sqnorms = exact.masked_fill(exact.isinf(), torch.nan)
        return ColumnProducts(scores_BQ, sqnorms)

    def _check(self, ids: np.ndarray, results: Mapping[str, ColumnProducts]) -> None:
        zeros = torch.zeros(len(ids), dtype=torch.float64)
        for name, products in results.items():
            if products.sqnorms is not None:
                wrong = zeros.masked_fill(products.sqnorms.cpu().isnan(), torch.nan)
                check_finite(self.checkpoint.name, "train", ids, zeros, {name: wrong})

    def _inverse_norms(self, results: Mapping[str, ColumnProducts]) -> Tensor:
        """(B,) of 1/|g| over all columns; 0 where a gradient is zero."""
        squares = torch.stack([sqnorms_of(products) for products in results.values()]).sum(0)
        return inverse_of_norms(squares.sqrt())


def sqnorms_of(products: ColumnProducts) -> Tensor:
    if products.sqnorms is not None:
        return products.sqnorms.cpu().double()
    return torch.full((len(products.scores_BQ),), torch.inf, dtype=torch.float64)
