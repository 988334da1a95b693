"""The products of TracIn-WE: scores of texts through their words.

Letters: T rows (the distinct words of each text), N train, Q query, P parts of a score.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import Ids
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.sparse_forms import Postings
from influence_cli.methods.pair_products import PairProducts, Units
from influence_cli.methods.pairwise import RankingFactory, rank_by_gradients
from influence_cli.methods.products import (
    ScaledQueries,
    extreme_norms,
    inner_products,
    inverse_of_norms,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.tracin_we import TracinWeOptions
from influence_cli.methods.word_selection import WordSelector
from influence_cli.methods.word_split import WordSplit
from influence_cli.progress import Advance


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

    def read_queries(number: int, ids: Ids) -> GradientRows:
        checkpoint = request.checkpoints[number]
        return concat_rows(list(source.read("query", checkpoint, [name], ids)))

    def prepare(number: int, rows: GradientRows, by_column: bool) -> WordQueries:
        return prepare_words(selector, rows)

    def add(
        totals_PQN: Tensor, number: int, queries: WordQueries, units: Units, advance: Advance
    ) -> bool:
        return add_products(selector, totals_PQN, number, queries, units, advance)

    products = PairProducts(query_bytes, read_queries, prepare, add)
    for ids, load, ranking in rank_by_gradients(source, request, new_ranking, products):
        split = WordSplit(selector, load(), ranking) if request.by == "word" else None
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


def prepare_words(selector: WordSelector, rows: GradientRows) -> WordQueries:
    """The words of some queries at one checkpoint, with their gradients."""
    source, name = selector.source, selector.column
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


def add_products(
    selector: WordSelector,
    totals_PQN: Tensor,
    number: int,
    queries: WordQueries,
    units: Units,
    advance: Advance,
) -> bool:
    """Add the products at one checkpoint to the scores of a block, and to their parts. Returns
    whether any product is not 0.
    """
    request, name = selector.request, selector.column
    factor = request.weights[number].of(request.columns[name].names)
    indices = (0, 1 + number) if request.by == "checkpoint" else (0,)
    first, any_product = 0, False
    for rows in units:
        last = first + len(rows.ids)
        scores_NQ = inner_products_of_words(selector, selector.select(rows.forms[name]), queries)
        any_product = any_product or bool(factor and scores_NQ.any())
        scores_QN = (scores_NQ.double() * factor).T.to(totals_PQN.device)
        for index in indices:
            totals_PQN[index, :, first:last] += scores_QN
        first = last
        advance(len(rows.ids))
    return any_product


def inner_products_of_words(selector: WordSelector, rows: Postings, queries: WordQueries) -> Tensor:
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
