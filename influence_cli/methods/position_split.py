"""--by token and --by query-token: the score of a ranked pair, split over the positions of one of
its examples.

The model runs again on the examples of ranked pairs. `token`: each position of the training example
has a share of its gradient, which is multiplied with the query's. `query-token`: the measure of a
query is the sum of the measures of its tokens, and so is its gradient.

Letters: S positions, Q queries, N training examples, D gradient.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.errors import InfluenceError, UsageProblem
from influence_cli.extraction.position_parts import (
    PositionParts,
    query_token_parts,
    train_position_parts,
)
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.methods.products import ScaledQueries, inverse_of_norms, products_in_range
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.token_texts import TokenTexts
from influence_cli.output.ranking import Entry, RankedQueries

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.methods.inner_products import QueryGradients, SquaredNorms
    from influence_cli.methods.pairwise import LoadPass, MapRows

POSITION_PARTS = ("token", "query-token")  # values of --by
REST = "-"  # the part of what has no position
# of the sum of the sizes of a score's parts: the rounding of a gradient on disk and in products
ALLOWED_ERROR = {torch.float64: 1e-6, torch.float32: 1e-2}
Pair = tuple[int, int]  # place of the query in its pass, id of the training example
Gather = Callable[[int, Pair, PositionParts, int], None]


def check_position_parts(
    source: GradientSource, request: ScoreRequest, mapped: bool = True
) -> None:
    """`mapped`: training gradients can be mapped instead of those of the queries. Raises
    UsageProblem for a request that has no parts by position.
    """
    if request.by not in POSITION_PARTS:
        return
    flag = f"--by {request.by}"
    if source.settings.projection is not None:
        raise UsageProblem(
            f"{flag} splits exact gradients, --project replaces them", "leave out --project"
        )
    if source.settings.storage_dtype not in ALLOWED_ERROR:
        raise UsageProblem(
            f"{flag} splits exact gradients, and --store "
            f"{str(source.settings.storage_dtype).removeprefix('torch.')} rounds them",
            "add --store float32",
        )
    if request.by != "query-token":
        return
    if request.sum_queries:
        raise UsageProblem(
            f"{flag} splits the score of one query, --sum-queries sums all queries",
            "give one of them",
        )
    if not mapped:
        raise UsageProblem(
            f"{flag} needs the map of single training gradients, and exact curvature solves for "
            "the queries only",
            "choose --curvature ekfac, or --by token",
        )
    if not source.run.definition.has("measure_tokens"):
        raise UsageProblem(
            f"{flag} needs measure_tokens(model, batch), and definition.py has none",
            "expected: a tensor (B, S) with the measure of each token of a query, which sum to "
            "measure(model, batch), or to minus loss(model, batch)",
        )


@dataclass(frozen=True)
class SplitRows:
    """What a pass of queries gives to a split. `queries`: prepared, at each checkpoint.
    `map_rows`: applied to the gradients of queries before products. `train_sqnorms`: see
    inner_products.score.
    """

    ids: "Ids"
    load: "LoadPass"
    ranking: RankedQueries
    map_rows: "MapRows | None"
    train_sqnorms: "SquaredNorms | None"


class PositionSplit(ABC):
    """`split(position, entries)` returns the (part, score) list of each entry, by rising
    position.
    """

    def __init__(self, source: GradientSource, request: ScoreRequest, rows: SplitRows) -> None:
        self.source, self.request, self.rows = source, request, rows
        self.texts = TokenTexts(source.run.definition)
        self.queries: list[QueryGradients] = rows.load()
        self._top: dict[Pair, PairParts] | None = None

    def __call__(self, position: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        pairs = self._split_pairs(position, entries)
        return [self._named(pairs[position, entry.train], position, entry) for entry in entries]

    def _split_pairs(self, position: int, entries: Sequence[Entry]) -> "dict[Pair, PairParts]":
        """Of a top ranking all pairs at once: the model runs once for each example."""
        ranking = self.rows.ranking
        if not ranking.is_top:
            return self._split_all([(position, entry.train) for entry in entries])
        if self._top is None:
            self._top = self._split_all(
                [
                    (query, entry.train)
                    for query in range(ranking.queries)
                    for entry in ranking.entries(query)
                ]
            )
        return self._top

    def _split_all(self, pairs: Sequence[Pair]) -> "dict[Pair, PairParts]":
        parts: dict[Pair, PairParts] = {}
        groups = self.group(pairs)
        total, ids = len(groups) * len(self.queries), sorted({train for _, train in pairs})
        label = f"parts by {self.request.by}"
        with self.source.reporter.progress(label, total) as advance:
            for number, queries in enumerate(self.queries):
                train = self._read_train(number, ids)
                for group in groups:
                    for pair, split in self.split_group(number, queries, group, train):
                        factor = self._inverse_norms(queries, train, pair)
                        parts[pair] = split.times(factor, parts.get(pair))
                    advance(1, f"checkpoint {number + 1} of {len(self.queries)}")
        return parts

    @abstractmethod
    def group(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        """The pairs whose split runs the model once."""

    @abstractmethod
    def split_group(
        self, number: int, queries: "QueryGradients", group: Sequence[Pair], train: "TrainRows"
    ) -> "list[tuple[Pair, PairParts]]":
        """The parts of the products of these pairs at a checkpoint, times the learning rates."""

    def _read_train(self, number: int, ids: list[int]) -> "TrainRows":
        if not self.request.normalize and self.request.by == "token":
            return TrainRows({}, None, torch.zeros(0))
        request, places = self.request, {id: place for place, id in enumerate(ids)}
        rows = concat_rows(
            list(
                self.source.read(
                    "train", request.checkpoints[number], list(request.columns), np.array(ids)
                )
            )
        )
        sqnorms = self.rows.train_sqnorms(rows) if self.rows.train_sqnorms else rows.sqnorms
        norms = sum(sqnorms.values(), torch.zeros(())).sqrt()
        return TrainRows(places, rows, inverse_of_norms(norms))

    def _inverse_norms(self, queries: "QueryGradients", train: "TrainRows", pair: Pair) -> float:
        if not self.request.normalize:
            return 1.0
        return float(queries.inverse_Q[pair[0]]) * float(train.inverse_N[train.places[pair[1]]])

    def _named(self, parts: "PairParts", query: int, entry: Entry) -> list[tuple[str, float]]:
        """Raises InfluenceError where the parts do not sum to the score."""
        rest = [] if parts.rest is None else [(REST, parts.rest)]
        values = [*parts.values.tolist(), *(value for _, value in rest)]
        size = sum(map(abs, values))
        if not abs(sum(values) - entry.score) <= self._allowed * max(size, abs(entry.score)):
            raise InfluenceError(
                f"the parts of a score do not sum to it: query {self.rows.ids[query]}, training "
                f"example {entry.train}",
                f"found: a sum of {sum(values):.6g}; expected: {entry.score:.6g}",
                "`influence check` compares the gradients with plain autograd",
            )
        ids = parts.ids if parts.ids is not None else [None] * len(parts.positions)
        names = [
            f"{position}:{self.texts.of(token) if token is not None else ''}"
            for position, token in zip(parts.positions, ids, strict=True)
        ]
        return [*zip(names, parts.values.tolist(), strict=True), *rest]

    @property
    def _allowed(self) -> float:
        settings = self.source.settings
        return max(ALLOWED_ERROR[settings.storage_dtype], settings.rounding)


@dataclass(frozen=True)
class PairParts:
    """The parts of one pair's score: `values` (S,) of positions, and of what has none."""

    positions: list[int]
    ids: list[int] | None
    values: np.ndarray
    rest: float | None

    @classmethod
    def of(cls, split: PositionParts, column: int) -> "PairParts":
        rest = None if split.rest is None else float(split.rest[column])
        return cls(split.positions, split.ids, split.parts[:, column], rest)

    def times(self, factor: float, others: "PairParts | None") -> "PairParts":
        """Times a factor, plus the parts at other checkpoints."""
        values, rest = self.values * factor, self.rest
        rest = None if rest is None else rest * factor
        if others is not None:
            values = values + others.values
            rest = others.rest if rest is None else rest + (others.rest or 0.0)
        return PairParts(self.positions, self.ids, values, rest)


@dataclass(frozen=True)
class TrainRows:
    """The gradients of training examples at a checkpoint, where a split needs them. `places`: row
    of each id. `inverse_N`: 1 / norm.
    """

    places: Mapping[int, int]
    rows: GradientRows | None
    inverse_N: Tensor


class TrainSplit(PositionSplit):
    """--by token."""

    def group(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        return group_by(pairs, 1)

    def split_group(
        self, number: int, queries: "QueryGradients", group: Sequence[Pair], train: TrainRows
    ) -> list[tuple[Pair, PairParts]]:
        places = torch.tensor([query for query, _ in group])
        split = train_position_parts(
            self.source.extractor,
            self.request.checkpoints[number],
            list(self.request.columns),
            group[0][1],
            QueryDirections.of(queries, places, self.source.device),
        )
        return [(pair, PairParts.of(split, at)) for at, pair in enumerate(group)]


class QuerySplit(PositionSplit):
    """--by query-token."""

    def group(self, pairs: Sequence[Pair]) -> list[list[Pair]]:
        return group_by(pairs, 0)

    def split_group(
        self, number: int, queries: "QueryGradients", group: Sequence[Pair], train: TrainRows
    ) -> list[tuple[Pair, PairParts]]:
        rows, map_rows = train.rows, self.rows.map_rows
        assert rows is not None
        some = rows.take(np.array([train.places[id] for _, id in group]))
        some = map_rows(some) if map_rows is not None else some
        factors = {names[0]: weight for names, (weight, _) in queries.counts.items()}
        directions = [
            {
                name: form.take(torch.tensor([at], device=form.device)).dense().values[0] * factor
                for name, form in some.forms.items()
                if (factor := factors[name])
            }
            for at in range(len(group))
        ]
        query = int(self.rows.ids[group[0][0]])
        split = query_token_parts(
            self.source.extractor,
            self.request.checkpoints[number],
            list(self.request.columns),
            query,
            directions,
        )
        return [(pair, PairParts.of(split, at)) for at, pair in enumerate(group)]


@dataclass(frozen=True)
class QueryDirections:
    """Gradients of some queries, times the weight of each parameter."""

    scaled: Mapping[str, ScaledQueries]
    weights: Mapping[str, float]
    device: torch.device
    count: int

    @classmethod
    def of(
        cls, queries: "QueryGradients", places: Tensor, device: torch.device
    ) -> "QueryDirections":
        """`places` (Q,): of the queries in their pass."""
        scaled = {}
        for names, query in queries.scaled.items():
            form = query.form.take(places.to(query.form.device))
            scale_Q = None if query.scale_Q is None else query.scale_Q[places]
            scaled[names[0]] = ScaledQueries(form, scale_Q)
        weights = {names[0]: weight for names, (weight, _) in queries.counts.items()}
        return cls(scaled, weights, device, len(places))

    def products(self, name: str, rows: Form) -> Tensor:
        """(R, Q) float64."""
        products_RQ, _ = products_in_range(rows, self.scaled[name], self.device)
        return products_RQ.cpu().double() * self.weights[name]

    def dense(self, name: str) -> Tensor:
        """(Q, D)."""
        query = self.scaled[name]
        values_QD = query.form.dense().values.to(self.device)
        if query.scale_Q is not None:
            values_QD = values_QD * query.scale_Q[:, None].to(values_QD)
        return values_QD * self.weights[name]


def group_by(pairs: Sequence[Pair], side: int) -> list[list[Pair]]:
    """The pairs with the same query (0) or the same training example (1), in rising order."""
    groups: dict[int, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(pair[side], []).append(pair)
    return [groups[key] for key in sorted(groups)]


def new_split(
    source: GradientSource, request: ScoreRequest, rows: SplitRows
) -> PositionSplit | None:
    """The split of a pass's ranked pairs; None where --by names no positions."""
    if request.by not in POSITION_PARTS:
        return None
    return (TrainSplit if request.by == "token" else QuerySplit)(source, request, rows)
