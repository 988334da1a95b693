"""What methods on pairs of rows share: query gradients, and the loop that ranks.

The loop: queries in passes, blocks of training examples outside, checkpoints inside. Each block is
ranked as soon as it is scored, so memory is flat in the number of training examples.

Letters: N train, Q query, P parts of a score, G groups, D gradient.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.cache.unit_file import Level
from influence_cli.errors import NonFiniteScore
from influence_cli.extraction.memory_budget import floor_power_of_two
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Dense, Form
from influence_cli.methods.request import Groups, ScoredQueries, ScoreRequest
from influence_cli.output.ranking import MergeableRanking, Ranking
from influence_cli.parallel.ranks import Ranks
from influence_cli.run.checkpoints import Checkpoint

QUERY_BYTES = 2 << 30  # query gradients in memory, over all checkpoints; more queries: more passes
BLOCK, MOST_QUERIES = 4096, 512  # of a block and a pass, where no gradients are read
TOTAL_BYTES = 16 << 20  # scores of a block of training examples
RankingFactory = Callable[[int, int], Ranking]  # (queries, parts) -> an empty ranking
Advance = Callable[..., None]
Units = Iterator[GradientRows]
# Any: what a method keeps of the queries of a pass
LoadQueries = Callable[[Ids], Any]
# (queries, blocks of ids, advance) -> of each block its scores and parts (1 + P, Q, N), float64
ScoreBlocks = Callable[[Any, Iterator[np.ndarray], Advance], Iterator[np.ndarray]]
# (queries, ids of a block, its rows unit by unit, advance) -> the same of one block
ScoreBlock = Callable[[Any, np.ndarray, Units, Advance], np.ndarray]
# (queries, ids of a block, advance) -> the same, computed while gradients are captured
ScoreCaptured = Callable[[Any, np.ndarray, Advance], np.ndarray]


def rank_by_gradients(
    source: GradientSource,
    request: ScoreRequest,
    new_ranking: RankingFactory,
    query_bytes: int,
    load_queries: LoadQueries,
    score_block: ScoreBlock,
    score_captured: ScoreCaptured | None = None,
) -> Iterator[tuple[Ids, Any, Ranking]]:
    """Rank by scores that are made from the gradients of both sides, block by block.

    `query_bytes`: of one query at one checkpoint. Yields as `rank_blocks` does. The rows of a
    block come unit by unit, at one checkpoint after the other. `score_captured` takes the place of
    `score_block` where no gradient is kept.
    """
    columns = list(request.columns)
    source.ensure("query", request.checkpoints, columns, request.queries)
    read_train = source.prepare("train", request.checkpoints, columns, request.train)

    def score_blocks(
        queries: Any, blocks: Iterator[np.ndarray], advance: Advance
    ) -> Iterator[np.ndarray]:
        if source.cache is None and score_captured is not None:
            for ids in blocks:
                yield score_captured(queries, ids, advance)
            return
        to_read, to_score = itertools.tee(blocks)
        ids_at = ((checkpoint, ids) for ids in to_read for checkpoint in request.checkpoints)
        units = read_train(ids_at)
        for ids in to_score:
            yield score_block(queries, ids, units, advance)
        next(units, None)  # its end: all units are on disk

    def size_for(width: int) -> int:
        return block_size(source, request, width)

    passes = query_passes(request, query_bytes)
    note_passes(source, len(passes))
    ranked = rank_blocks(source, request, new_ranking, passes, size_for, load_queries, score_blocks)
    try:
        for scored in ranked:
            report_numbers(source, request.checkpoints, columns)
            yield scored
    except NonFiniteScore as error:
        if request.groups or request.sum_queries or len(passes) > 1:
            raise
        where = describe_largest_product(source, request, error)
        raise NonFiniteScore(error.query, error.train, error.score, where) from error


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


def sum_groups(
    groups: Groups,
    scored: Iterator[tuple[np.ndarray, np.ndarray]],
    turns: int,
    ranks: Ranks,
    shape: tuple[int, int],
) -> np.ndarray:
    """(1 + P, Q, G) sums of all blocks. They are added block by block in the order of the ids, so
    that sums do not depend on the number of ranks. `turns`: blocks of the
    rank that has the most. `shape`: P, Q."""
    parts, width = shape
    sums = np.zeros((parts + 1, width, len(groups.names)))
    for _ in range(turns):
        block = next(scored, None)
        for block_sums in ranks.gather(group_sums(groups, *block) if block else None):
            if block_sums is not None:
                numbers, values = block_sums
                sums[:, :, numbers] += values
    return sums


def group_sums(
    groups: Groups, ids: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The groups (G,) of a block, and the sums (1 + P, Q, G) of its scores (1 + P, Q, N)."""
    numbers, inverse = np.unique(groups.of[ids], return_inverse=True)
    sums = np.zeros((*totals.shape[:2], len(numbers)))
    np.add.at(sums.transpose(2, 0, 1), inverse, totals.transpose(2, 0, 1))
    return numbers, sums


def next_units(units: Units, count: int) -> Units:
    """The units of the next `count` examples."""
    done = 0
    while done < count:
        rows = next(units)
        done += len(rows.ids)
        yield rows


def query_passes(request: ScoreRequest, query_bytes: int) -> list[Ids]:
    """The queries, cut into passes; one pass with --sum-queries.

    The gradients of a pass fit into QUERY_BYTES over all checkpoints, and its scores of the
    smallest block into 8 TOTAL_BYTES.
    """
    most = min(
        QUERY_BYTES // (query_bytes * len(request.checkpoints)),
        8 * TOTAL_BYTES // (4096 * 8 * (1 + len(request.parts))),
    )
    count = len(request.queries)
    size = count if request.sum_queries else max(1, most)
    return [request.queries[first : first + size] for first in range(0, count, size)]


def note_passes(source: GradientSource, passes: int) -> None:
    if passes > 1 and source.cache is None:
        source.reporter.note(
            f"the queries take {passes} passes, and with --cache none each pass computes the "
            "gradients of all training examples: a cache computes them once"
        )


def block_size(
    source: GradientSource, request: ScoreRequest, queries: int, level: Level = "values"
) -> int:
    """Training examples of a block: some for each query, whole units, and work for several
    ranks.
    """
    most = TOTAL_BYTES // (8 * queries * (1 + len(request.parts)))
    shared = min(floor_power_of_two(most), floor_power_of_two(len(request.train) // 64))
    unit = source.budget.unit_size("train", list(request.columns), level)
    return max(min(4096, floor_power_of_two(4 * queries)), 256, unit, shared)


def query_rows(
    source: GradientSource, request: ScoreRequest, checkpoint: Checkpoint, ids: Ids
) -> GradientRows:
    """Query gradients at one checkpoint, in memory, each in the form whose products cost least."""
    rows = concat_rows(list(source.read("query", checkpoint, list(request.columns), ids)))
    forms = {name: form.as_queries() for name, form in rows.forms.items()}
    return dataclasses.replace(rows, forms=forms)


def mean_query_row(
    source: GradientSource, request: ScoreRequest, checkpoint: Checkpoint, ids: Ids
) -> GradientRows:
    """--sum-queries: the mean query gradient at one checkpoint as one row, summed in float64."""
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
    return GradientRows(np.zeros(1, np.int64), one, one, squares, forms)


def dtype_of(form: Form) -> torch.dtype:
    """The floating dtype of a form's tensors."""
    return next(value.dtype for value in form.tensors().values() if value.is_floating_point())
