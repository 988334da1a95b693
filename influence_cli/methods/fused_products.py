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
from influence_cli.methods.products import (
    ScaledQueries,
    inverse_of_norms,
    products_in_range,
    products_unwatched,
)
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint


@dataclass(frozen=True)
class ColumnProducts:
    """Of one column: products (B, Q), and squared norms (B,) of the gradients: infinite where they
    are not known, NaN where a gradient is not finite. None: no norm is known. `doubtful`: mask (B,)
    of gradients to look at again; None where they were looked at.
    """

    scores_BQ: Tensor
    sqnorms: Tensor | None
    doubtful: Tensor | None = None


@dataclass
class BlockScores:
    """The scores of a block, and what is to be looked at when all of them are computed."""

    totals_PQN: Tensor
    numbers: list[tuple[np.ndarray, Tensor, Tensor]] = field(default_factory=list)
    any_product: list[Tensor] = field(default_factory=list)
    doubtful: list[Tensor] = field(default_factory=list)


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

        On a GPU it waits once, at the end. Where a number leaves the range of float32, it computes
        the block again, and looks at each batch.
        """
        block = self._visit(columns, ids, advance, where, looks=looks_at_batches(self.source))
        if block.doubtful and bool(torch.stack(block.doubtful).any()):
            advance(-len(ids), where)
            block = self._visit(columns, ids, advance, where, looks=True)
        for some_ids, losses, squares in block.numbers:
            step = self.checkpoint.step
            self.source.counts.add_numbers("train", step, some_ids, losses.cpu(), squares.cpu())
        any_product = bool(torch.stack(block.any_product).any())
        self.source.counts.add_gradients("train", any_product)
        return block.totals_PQN, any_product

    def _visit(
        self, columns: Sequence[str], ids: np.ndarray, advance: Advance, where: str, looks: bool
    ) -> BlockScores:
        device = self.source.device
        # Products are added in float64, which MPS lacks.
        place = device if device.type == "cuda" else torch.device("cpu")
        block = BlockScores(torch.zeros(self.shape, dtype=torch.float64, device=place))

        def take(visited: tuple[slice, Tensor, dict[str, ColumnProducts]]) -> None:
            at, losses, results = visited
            self._memo.clear()
            if looks:
                self._check(ids[at], results)
            else:
                masks = [results[name].doubtful for name in columns]
                block.doubtful.append(torch.stack([m for m in masks if m is not None]).any())
            batch_PQB = block.totals_PQN[:, :, at].zero_()
            for name in columns:  # in the same order as for cached gradients
                weight, part = self.counts[name]
                scores_QB = results[name].scores_BQ.T.to(place)
                block.any_product.append(scores_QB.any())
                for index in {0, part}:
                    batch_PQB[index].add_(scores_QB, alpha=weight)
            norms = torch.stack([sqnorms_of(results[name], place) for name in columns]).sum(0)
            if self.inverse_Q is not None:
                batch_PQB *= self.inverse_Q.to(place)[:, None] * inverse_of_norms(norms.sqrt())
            block.numbers.append((ids[at], losses, norms))

        def multiply(name: str, form: Form) -> ColumnProducts:
            return self._multiply(name, form, looks)

        self.source.extractor.visit_at(
            self.checkpoint, "train", columns, ids, multiply, take, advance, where
        )
        return block

    def _multiply(self, name: str, form: Form, looks: bool) -> ColumnProducts:
        projection, device = self.source.settings.projection, self.source.device
        exact = None
        if projection:
            exact, form = projection(name, form)
        elif self.inverse_Q is not None:
            exact = form.sqnorm()
        sqnorms, doubtful = None, None
        if looks:
            scores_BQ, sqnorms = products_in_range(form, self.queries[name], device, self._memo)
        else:
            scores_BQ, doubtful = products_unwatched(form, self.queries[name], device, self._memo)
        if exact is not None:
            sqnorms = exact.masked_fill(exact.isinf(), torch.nan)
            doubtful = None if doubtful is None else doubtful | sqnorms.isnan()
        return ColumnProducts(scores_BQ, sqnorms, doubtful)

    def _check(self, ids: np.ndarray, results: Mapping[str, ColumnProducts]) -> None:
        zeros = torch.zeros(len(ids), dtype=torch.float64)
        for name, products in results.items():
            if products.sqnorms is not None:
                wrong = zeros.masked_fill(products.sqnorms.cpu().isnan(), torch.nan)
                data = self.source.run.train.source
                check_finite(self.checkpoint.name, data, ids, zeros, {name: wrong})


def looks_at_batches(source: GradientSource) -> bool:
    """Whether each batch is looked at when it is computed: a CUDA device would have to be waited
    for.
    """
    return source.device.type != "cuda"


def sqnorms_of(products: ColumnProducts, place: torch.device) -> Tensor:
    if products.sqnorms is not None:
        return products.sqnorms.to(place).double()
    return torch.full((len(products.scores_BQ),), torch.inf, dtype=torch.float64, device=place)
