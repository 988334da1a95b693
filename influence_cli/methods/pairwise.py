"""What methods on pairs of rows share: query gradients, and the loop that ranks.

The loop: queries in rounds, blocks of training examples outside, checkpoints inside. Each block is
ranked as soon as it is scored, so memory is flat in the number of training examples.

Letters: N train, Q query, P parts of a score, D gradient.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.errors import NonFiniteScore
from influence_cli.extraction.query_files import QueryFiles, open_query_files
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Dense, Form
from influence_cli.methods.group_sums import sum_groups
from influence_cli.methods.pair_products import (
    LoadedQueries,
    PairProducts,
    RoundQueries,
    RoundScorer,
    ScoreCaptured,
)
from influence_cli.methods.query_passes import PassPlan, note_passes, plan_passes
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.output.ranking import MergeableRanking, RankedQueries, Ranking, RankingSlice
from influence_cli.parallel.ranks import Ranks
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint

BLOCK, MOST_QUERIES = 4096, 512  # of a block and a pass, where no gradients are read
RankingFactory = Callable[[int, int], Ranking]  # (queries, parts) -> an empty ranking
# Any: what a method keeps of the queries of a pass
LoadQueries = Callable[[Ids], Any]
# (queries, blocks of ids, advance) -> of each block its scores and parts (1 + P, Q, N), float64
ScoreBlocks = Callable[[Any, Iterator[np.ndarray], Advance], Iterator[np.ndarray]]
MapRows = Callable[[GradientRows], GradientRows]
LoadPass = Callable[[], list[Any]]  # -> the prepared queries of a pass, at each checkpoint


def rank_by_gradients(
    source: GradientSource,
    request: ScoreRequest,
    new_ranking: RankingFactory,
    products: PairProducts,
    score_captured: ScoreCaptured | None = None,
) -> Iterator[tuple[Ids, LoadPass, RankedQueries]]:
    """Rank by scores that are made from the gradients of both sides, block by block.

    Yields per pass its query ids, a function that returns its prepared queries, and their ranking.
    `score_captured` takes the place of `products.add` where no gradient is kept and a round has one
    pass.
    """
    columns = list(request.columns)
    source.ensure("query", request.checkpoints, columns, request.queries)
    read_train = source.prepare("train", request.checkpoints, columns, request.train)
    plan = plan_passes(source, request, products.query_bytes)
    note_passes(source, plan)
    with query_files(source, request, plan) as files:
        scorer = RoundScorer(source, request, products, score_captured, plan, files, read_train)
        ranked = rank_blocks(
            source,
            request,
            new_ranking,
            plan.rounds,
            scorer.block_size,
            scorer.load_queries,
            scorer.score_blocks,
        )
        try:
            for ids, queries, ranking in ranked:
                for scored in split_round(ids, queries, ranking):
                    report_numbers(source, request.checkpoints, columns)
                    yield scored
        except NonFiniteScore as error:
            raise located(source, request, error, scorer.offset) from error


def split_round(
    ids: Ids, queries: RoundQueries, ranking: Ranking
) -> Iterator[tuple[Ids, LoadPass, RankedQueries]]:
    """The passes of a ranked round."""
    if isinstance(queries, LoadedQueries):
        yield ids, lambda: queries.prepared, ranking
        return
    first = 0
    for number, some in enumerate(queries.passes):
        yield some, partial(queries.load_pass, number), RankingSlice(ranking, first, len(some))
        first += len(some)


def query_files(
    source: GradientSource, request: ScoreRequest, plan: PassPlan
) -> AbstractContextManager[QueryFiles | None]:
    """Files for the gradients of queries, where a round has several passes. Raises OutputError: no
    room for them.
    """
    if not plan.disk_bytes:
        return nullcontext()
    beside = source.ranks.place.beside  # each rank has its own
    return open_query_files(
        list(request.columns), len(request.checkpoints), plan.disk_bytes, beside
    )


def located(
    source: GradientSource, request: ScoreRequest, error: NonFiniteScore, offset: int
) -> NonFiniteScore:
    """The error with the query's place among all queries, and with what made it, if one pair did.
    `offset`: place of the first query of its ranking.
    """
    query = error.query + offset
    moved = NonFiniteScore(query, error.train, error.score)
    if request.groups or request.sum_queries:
        return moved
    where = describe_largest_product(source, request, moved)
    return NonFiniteScore(query, error.train, error.score, where)


def describe_largest_product(
    source: GradientSource, request: ScoreRequest, error: NonFiniteScore
) -> str:
    """Where the parts of a score are largest, by the norms of both gradients."""
    columns, largest, where = list(request.columns), -1.0, ""
    ids = {"train": error.train, "query": int(request.queries[error.query])}
    for checkpoint, weight in zip(request.checkpoints, request.weights, strict=True):
        norms = [
            source.extractor.rows_at(checkpoint, split, columns, np.array([id]), "norms").sqnorms
            for split, id in ids.items()
        ]
        for name, column in request.columns.items():
            train, query = (float(sqnorms[name].sqrt()) for sqnorms in norms)
            factor = weight.of(column.names)
            if factor * train * query > largest:
                largest = factor * train * query
                where = (
                    f"its largest part: {checkpoint.name}, {column.layer}: weight {factor:g},"
                    f" gradient norms {train:.3g} (training example) and {query:.3g} "
                    f"(query {ids['query']})"
                )
    return where


def score_without_gradients(
    source: GradientSource,
    request: ScoreRequest,
    new_ranking: RankingFactory,
    load_queries: LoadQueries,
    score_blocks: ScoreBlocks,
) -> Iterator[ScoredQueries]:
    """Rank by scores that need no cached gradients, in blocks of a fixed size."""
    count = len(request.queries)
    size = count if request.sum_queries else MOST_QUERIES
    passes = [request.queries[first : first + size] for first in range(0, count, size)]
    for ids, _, ranking in rank_blocks(
        source, request, new_ranking, passes, lambda width: BLOCK, load_queries, score_blocks
    ):
        names = None if request.sum_queries else [int(query) for query in ids]
        yield ScoredQueries(names, ranking, request.parts)


def rank_blocks(
    source: GradientSource,
    request: ScoreRequest,
    new_ranking: RankingFactory,
    passes: list[Ids],
    size_for: Callable[[int], int],
    load_queries: LoadQueries,
    score_blocks: ScoreBlocks,
) -> Iterator[tuple[Ids, Any, Ranking]]:
    """Per pass its query ids, what `load_queries` made of them, and their ranking.

    `size_for(Q)`: training examples of a block. The ranks of a job take turns with the blocks, and
    rank 0 has the rankings; the others yield nothing.
    """
    ranks, parts = source.ranks, request.parts
    total = len(request.train) * len(request.checkpoints) // ranks.count
    for number, ids in enumerate(passes, start=1):
        label = f"scores, queries {number} of {len(passes)}" if len(passes) > 1 else "scores"
        with source.reporter.progress(label, total) as advance:
            queries = load_queries(ids)
            width = 1 if request.sum_queries else len(ids)
            ranking = new_ranking(width, len(parts))
            size = size_for(width)
            totals = score_blocks(queries, blocks_of_rank(request.train, size, ranks), advance)
            scored = zip(blocks_of_rank(request.train, size, ranks), totals, strict=True)
            if request.groups:
                turns = -(-sum(1 for _ in cut_ids(request.train, size)) // ranks.count)
                sums = sum_groups(request.groups, scored, turns, ranks, (len(parts), width))
                ranking.add(np.arange(sums.shape[2]), sums[0], sums[1:])
            else:
                for block, total_PQN in scored:
                    ranking.add(block, total_PQN[0], total_PQN[1:])
                merge_rankings(ranks, ranking)
        if ranks.rank == 0:
            yield ids, queries, ranking


def blocks_of_rank(ids: Ids, size: int, ranks: Ranks) -> Iterator[np.ndarray]:
    """Every `ranks.count`-th block of the ids, from the rank's own number on."""
    return itertools.islice(cut_ids(ids, size), ranks.rank, None, ranks.count)


def merge_rankings(ranks: Ranks, ranking: Ranking) -> None:
    """Send the partial rankings of the other ranks to rank 0's ranking."""
    if ranks.count > 1:
        assert isinstance(ranking, MergeableRanking)
        for partial in ranks.collect(ranking.export_partials()):
            ranking.import_partial(partial)


def query_rows(
    source: GradientSource,
    request: ScoreRequest,
    checkpoint: Checkpoint,
    ids: Ids,
    map_rows: MapRows | None = None,
) -> GradientRows:
    """Query gradients at one checkpoint, in memory, each in the form whose products cost least.
    `map_rows` is applied to them before.
    """
    rows = concat_rows(list(source.read("query", checkpoint, list(request.columns), ids)))
    if map_rows is not None:
        rows = map_rows(rows)
    forms = {name: form.as_queries() for name, form in rows.forms.items()}
    return dataclasses.replace(rows, forms=forms)


def mean_query_row(
    source: GradientSource,
    request: ScoreRequest,
    checkpoint: Checkpoint,
    ids: Ids,
    map_rows: MapRows | None = None,
) -> GradientRows:
    """--sum-queries: the mean query gradient at one checkpoint as one row, summed in float64.
    `map_rows` is applied to it.
    """
    sums: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for rows in source.read("query", checkpoint, list(request.columns), ids):
        ones = torch.ones(len(rows.ids), 1, dtype=torch.float64)
        for name, form in rows.forms.items():
            part = form.to(form.device, torch.float64).rmatvec(ones).T
            dtypes[name] = dtype_of(form)
            sums[name] = sums[name] + part if name in sums else part
    forms: dict[str, Form] = {
        name: Dense(request.columns[name].shape, (total / len(ids)).to(dtypes[name]))
        for name, total in sums.items()
    }
    squares = {name: form.sqnorm() for name, form in forms.items()}
    one = torch.zeros(1, dtype=torch.float64)
    row = GradientRows(np.zeros(1, np.int64), one, one, squares, forms)
    return row if map_rows is None else map_rows(row)


def dtype_of(form: Form) -> torch.dtype:
    """The floating dtype of a form's tensors."""
    return next(value.dtype for value in form.tensors().values() if value.is_floating_point())
