"""The products of TracIn-WE: scores of texts through their words.

Letters: T rows (the distinct words of each text), N train, Q query, P parts of a score.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import concat_rows
from influence_cli.cache.id_blocks import Ids
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.sparse_forms import Postings
from influence_cli.methods.pairwise import (
    Advance,
    RankingFactory,
    Units,
    next_units,
    rank_by_gradients,
)
from influence_cli.methods.products import (
    ScaledQueries,
    extreme_norms,
    inner_products,
    inverse_of_norms,
    refuse_underflow,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.tracin_we import TracinWeOptions
from influence_cli.methods.word_selection import WordSelector
from influence_cli.methods.word_split import WordSplit
from influence_cli.run.checkpoints import Checkpoint


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every requested training example, ranked per query.

    With `by="word"` the result splits ranked pairs into words.
    """
    options = request.options
    assert isinstance(options, TracinWeOptions)
    selector = WordSelector(source, request, options)
    name = selector.column
    bytes_per_example = source.budget.sizes("query", [name]).example_bytes([name])
    widening = max(1, 4 // source.settings.storage_dtype.itemsize)
    query_bytes = max(1, bytes_per_example * widening) * (1 + options.synonyms)

    def load_queries(ids: Ids) -> list[WordQueries]:
        return [query_words(selector, checkpoint, ids) for checkpoint in request.checkpoints]

    def score_block(
        queries: list[WordQueries], ids: np.ndarray, units: Units, advance: Advance
    ) -> np.ndarray:
        return block_scores(selector, queries, ids, units, advance)

    for ids, queries, ranking in rank_by_gradients(
        source, request, new_ranking, query_bytes, load_queries, score_block
    ):
        split = WordSplit(selector, queries, ranking) if request.by == "word" else None
        names = None if request.sum_queries else [int(query) for query in ids]
        yield ScoredQueries(names, ranking, request.parts, split)


@dataclass(frozen=True)
class WordQueries:
    """The queries at one checkpoint, by token.

    `word`: of each row the query's own word; another than its token where the row is a synonym.
    """

    postings: Postings
    word: Tensor  # (T,)
    norms: Tensor  # (Q,)
    scaled: ScaledQueries  # the postings on the device, for products

    def rows_of(self, query: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, own words and gradients of one query's rows."""
        tokens = torch.repeat_interleave(self.postings.tokens, self.postings.starts.diff())
        rows = self.postings.example == query
        return tokens[rows], self.word[rows], self.postings.values[rows].double()


def query_words(selector: WordSelector, checkpoint: Checkpoint, ids: Ids) -> WordQueries:
    """The gradients of the queries' words at one checkpoint, in memory."""
    source, name = selector.source, selector.column
    rows = concat_rows(list(source.read("query", checkpoint, [name], ids)))
    postings = selector.select(rows.forms[name], query=True)
    if selector.request.sum_queries:
        postings = mean_query(postings)
    norms = postings.sqnorm().sqrt()
    words = torch.repeat_interleave(postings.tokens, postings.starts.diff())
    if selector.options.synonyms:
        postings, words = selector.with_synonyms(postings, words)
    on_device = postings.to(source.device)
    assert isinstance(on_device, Postings)
    return WordQueries(on_device, words, norms, ScaledQueries.of(postings).to(source.device))


def block_scores(
    selector: WordSelector,
    queries: list[WordQueries],
    ids: np.ndarray,
    units: Units,
    advance: Advance,
) -> np.ndarray:
    """(1 + P, Q, N) float64: the scores of a block, then their parts by checkpoint."""
    request, name = selector.request, selector.column
    shape = 1 + len(request.parts), len(ids), len(queries[0].postings)
    totals_PNQ = torch.zeros(shape, dtype=torch.float64)
    count, any_product = len(request.checkpoints), False
    for k, weight in enumerate(request.weights):
        factor = weight.of(request.columns[name].names)
        first = 0
        for rows in next_units(units, len(ids)):
            last = first + len(rows.ids)
            words = selector.select(rows.forms[name])
            scores_NQ = products(selector, words, queries[k])
            any_product = any_product or bool(scores_NQ.any())
            scores_NQ = scores_NQ.double() * factor
            totals_PNQ[0, first:last] += scores_NQ
            if request.by == "checkpoint":
                totals_PNQ[1 + k, first:last] += scores_NQ
            first = last
            advance(len(rows.ids), f"checkpoint {k + 1} of {count}")
    if any_product and any(
        request.weights[k].of(request.columns[name].names) for k in range(count)
    ):
        refuse_underflow(float(totals_PNQ[0].abs().max()), any_product)
    return totals_PNQ.transpose(1, 2).contiguous().numpy()


def products(selector: WordSelector, rows: Postings, queries: WordQueries) -> Tensor:
    """(N, Q) inner products over the words of both texts, on the CPU; cosines with --normalize."""
    sqnorms_N, device = rows.sqnorm(), selector.source.device
    products_NQ = inner_products(rows, queries.scaled, device, extreme_norms(sqnorms_N)).cpu()
    if selector.request.normalize:
        inverse_N = inverse_of_norms(sqnorms_N.sqrt())
        return products_NQ * inverse_N[:, None] * inverse_of_norms(queries.norms)
    return products_NQ


def mean_query(postings: Postings) -> Postings:
    """--sum-queries: the mean of the queries' rows, token by token, as one query."""
    tokens = torch.repeat_interleave(torch.arange(len(postings.tokens)), postings.starts.diff())
    values = torch.zeros(len(postings.tokens), postings.values.shape[1], dtype=torch.float64)
    values.index_add_(0, tokens, postings.values.double() / len(postings))
    count = len(postings.tokens)
    return replace(
        postings,
        starts=torch.arange(count + 1),
        example=torch.zeros(count, dtype=torch.int64),
        values=values.to(postings.values.dtype),
        counts=torch.tensor([count]),
    )
