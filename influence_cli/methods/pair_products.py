"""Scores of a block of training examples with queries, from the gradients of both sides.

Letters: N train, Q query, P parts of a score.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.extraction.query_files import QueryFiles
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.products import refuse_underflow
from influence_cli.methods.query_passes import PassPlan, block_size, cut, round_block_size
from influence_cli.methods.request import ScoreRequest
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint

Units = Iterator[GradientRows]


@dataclass(frozen=True)
class PairProducts:
    """How a method multiplies the gradients of both sides at a checkpoint, which has a number.

    `query_bytes`: of one query at one checkpoint.
    `read_queries`: (number, ids) -> the gradients of some queries.
    `prepare_queries`: (number, these gradients, by_column) -> what the products need of them (Any:
    each method its own). `by_column`: the training gradients come column by column.
    `add`: (totals (1 + P, Q, N) float64, number, prepared queries, the rows of N examples unit by
    unit, advance) adds the products to the totals. Returns True where a product is not 0 and scores
    may underflow.
    """

    query_bytes: int
    read_queries: Callable[[int, Ids], GradientRows]
    prepare_queries: Callable[[int, GradientRows, bool], Any]
    add: Callable[[Tensor, int, Any, Units, Advance], bool]


@dataclass(frozen=True)
class LoadedQueries:
    """The queries of a pass in memory, prepared, at each checkpoint. `width`: their number, or 1
    for their mean.
    """

    width: int
    prepared: list[Any]


@dataclass(frozen=True)
class FiledQueries:
    """The queries of a round of several passes. Their gradients are in temporary files."""

    files: QueryFiles
    passes: list[Ids]
    products: PairProducts

    def load_pass(self, number: int) -> list[Any]:
        """The prepared queries of a pass, at each checkpoint."""
        return [
            self.products.prepare_queries(checkpoint, rows, False)
            for checkpoint in range(self.files.checkpoints)
            for rows in self.files.read(checkpoint, [number])
        ]


RoundQueries = LoadedQueries | FiledQueries
# (prepared queries, ids of a block, advance) -> its scores and parts (1 + P, Q, N), computed while
# gradients are captured
ScoreCaptured = Callable[[list[Any], np.ndarray, Advance], np.ndarray]
ReadTrain = Callable[[Iterable[tuple[Checkpoint, Ids]]], Units]


@dataclass
class RoundScorer:
    """Loads the queries of a round, and scores blocks of training examples with them.

    `files`: where a round has several passes. `offset`: place of the round's first query.
    """

    source: GradientSource
    request: ScoreRequest
    products: PairProducts
    score_captured: ScoreCaptured | None
    plan: PassPlan
    files: QueryFiles | None
    read_train: ReadTrain
    offset: int = 0

    @property
    def captures(self) -> bool:
        """Whether a round of one pass is scored while gradients are captured."""
        return self.source.cache is None and self.score_captured is not None

    def load_queries(self, ids: Ids) -> RoundQueries:
        """The queries of a round, in memory if it has one pass."""
        self.offset = next(at for at, id in enumerate(self.request.queries) if id == ids[0])
        if len(ids) > self.plan.pass_size:
            assert self.files is not None
            passes = cut(ids, self.plan.pass_size)
            return file_queries(self.source, self.request, self.products, passes, self.files)
        return load_queries(self.request, self.products, ids, self.captures)

    def block_size(self, queries: int) -> int:
        """Training examples of a block, for the queries of a round."""
        size = round_block_size if queries > self.plan.pass_size else block_size
        return size(self.source, self.request, queries)

    def score_blocks(
        self, queries: RoundQueries, blocks: Iterator[np.ndarray], advance: Advance
    ) -> Iterator[np.ndarray]:
        """Of each block its scores and parts (1 + P, Q, N)."""
        pair = self.source, self.request, self.products
        if isinstance(queries, FiledQueries):
            for ids in blocks:
                yield round_block_scores(*pair, queries, ids, advance)
        elif self.score_captured is not None and self.captures:
            for ids in blocks:
                yield self.score_captured(queries.prepared, ids, advance)
        else:
            to_read, to_score = itertools.tee(blocks)
            points = self.request.checkpoints
            units = self.read_train((point, ids) for ids in to_read for point in points)
            for ids in to_score:
                yield block_scores(*pair, queries, ids, units, advance)
            next(units, None)  # its end: all units are on disk


def load_queries(
    request: ScoreRequest, products: PairProducts, ids: Ids, by_column: bool
) -> LoadedQueries:
    """The queries of a pass, all of them in memory."""
    prepared = [
        products.prepare_queries(number, products.read_queries(number, ids), by_column)
        for number in range(len(request.checkpoints))
    ]
    return LoadedQueries(1 if request.sum_queries else len(ids), prepared)


def file_queries(
    source: GradientSource,
    request: ScoreRequest,
    products: PairProducts,
    passes: list[Ids],
    files: QueryFiles,
) -> FiledQueries:
    """Compute the gradients of the queries of a round, and write them to the files. Raises
    OutputError: a full disk.
    """
    total = sum(map(len, passes)) * len(request.checkpoints)
    with source.reporter.progress("gradients of query examples", total) as advance:
        for checkpoint in range(len(request.checkpoints)):
            for number, ids in enumerate(passes):
                files.write(checkpoint, number, products.read_queries(checkpoint, ids))
                where = f"checkpoint {checkpoint + 1} of {len(request.checkpoints)}"
                advance(len(ids), where)
    return FiledQueries(files, passes, products)


def block_scores(
    source: GradientSource,
    request: ScoreRequest,
    products: PairProducts,
    queries: LoadedQueries,
    ids: np.ndarray,
    units: Units,
    advance: Advance,
) -> np.ndarray:
    """(1 + P, Q, N) float64: the scores of a block, then their parts. `units`: the rows of the
    block at one checkpoint after the other. Raises InfluenceError where all scores underflow.
    """
    totals_PQN = new_totals(source, request, queries.width, len(ids))
    count, any_product = len(request.checkpoints), False
    for number, prepared in enumerate(queries.prepared):
        doing = partial(advance, where=f"checkpoint {number + 1} of {count}")
        rows = next_units(units, len(ids))
        any_product |= products.add(totals_PQN, number, prepared, rows, doing)
    return checked_scores(totals_PQN, any_product)


def round_block_scores(
    source: GradientSource,
    request: ScoreRequest,
    products: PairProducts,
    queries: FiledQueries,
    ids: np.ndarray,
    advance: Advance,
) -> np.ndarray:
    """The same for all queries of a round, pass by pass. The gradients of the block are computed
    once at each checkpoint, and are in memory until all passes are multiplied with them.
    """
    columns, count = list(request.columns), len(request.checkpoints)
    totals_PQN = new_totals(source, request, sum(map(len, queries.passes)), len(ids))
    any_product = False
    for number, checkpoint in enumerate(request.checkpoints):
        units = []
        for unit in source.read("train", checkpoint, columns, ids):
            units.append(unit)
            advance(len(unit.ids), f"checkpoint {number + 1} of {count}")
        first = 0
        for rows in queries.files.read(number, range(len(queries.passes))):
            part_PQN = totals_PQN[:, first : first + len(rows.ids)]
            prepared = products.prepare_queries(number, rows, False)
            any_product |= products.add(part_PQN, number, prepared, iter(units), silent)
            first += len(rows.ids)
    return checked_scores(totals_PQN, any_product)


def new_totals(source: GradientSource, request: ScoreRequest, width: int, count: int) -> Tensor:
    """Zeros (1 + P, Q, N), for products of this device: float64, which MPS lacks."""
    place = source.device if source.device.type == "cuda" else torch.device("cpu")
    shape = 1 + len(request.parts), width, count
    return torch.zeros(shape, dtype=torch.float64, device=place)


def checked_scores(totals_PQN: Tensor, any_product: bool) -> np.ndarray:
    if any_product:
        refuse_underflow(float(totals_PQN[0].abs().max()), any_product)
    return totals_PQN.cpu().numpy()


def next_units(units: Units, count: int) -> Units:
    """The units of the next `count` examples."""
    done = 0
    while done < count:
        rows = next(units)
        done += len(rows.ids)
        yield rows


def silent(examples: int, where: str = "") -> None:
    """Progress that nobody sees: the rows were counted as they were computed."""
