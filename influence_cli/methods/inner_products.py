"""Scores as inner products of gradients, summed over checkpoints: what tracin, grad-dot and
grad-cos share.

scores_QN = sum over checkpoints i of eta_i * query_grads_QD @ train_grads_ND.T

Letters: N train, Q query, P parts of a score, D gradient.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.store import UNIT_EXAMPLES
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import side_by_side
from influence_cli.gradients.forms import Form, Projected
from influence_cli.gradients.row_products import Memo
from influence_cli.methods.fused_products import FusedProducts
from influence_cli.methods.pair_products import PairProducts, Units
from influence_cli.methods.pairwise import (
    MapRows,
    RankingFactory,
    mean_query_row,
    query_rows,
    rank_by_gradients,
)
from influence_cli.methods.position_split import SplitRows, check_position_parts, new_split
from influence_cli.methods.products import (
    ScaledQueries,
    extreme_norms,
    inner_products,
    inverse_of_norms,
    refuse_underflow,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.progress import Advance

SMALL_PART = 512  # training examples multiplied at once: their products stay in the CPU's cache
SMALL = 1e-100  # a factor below which scores may underflow
WIDE_ROW_BYTES = 8192  # rows from which that matters
Columns = tuple[str, ...]  # columns that are multiplied as one
SquaredNorms = Callable[[GradientRows], dict[str, Tensor]]  # -> by column (N,) float64


def score(
    source: GradientSource,
    request: ScoreRequest,
    new_ranking: RankingFactory,
    map_queries: MapRows | None = None,
    train_sqnorms: SquaredNorms | None = None,
) -> Iterator[ScoredQueries]:
    """Scores of every requested training example, ranked per query. `map_queries`: applied to the
    gradients of queries before the products. `train_sqnorms`: for --normalize, squared norms of
    training gradients in another metric; `map_queries` gives those of the queries.
    """
    check_position_parts(source, request)
    rows_of = mean_query_row if request.sum_queries else query_rows
    metric_sqnorms = train_sqnorms if request.normalize else None

    def read_queries(number: int, ids: Ids) -> GradientRows:
        return rows_of(source, request, request.checkpoints[number], ids, map_queries)

    def prepare(number: int, rows: GradientRows, by_column: bool) -> QueryGradients:
        return QueryGradients.of(request, number, rows, not by_column, source.device)

    def add(
        totals_PQN: Tensor, number: int, queries: QueryGradients, units: Units, advance: Advance
    ) -> bool:
        return add_products(
            source.device, request, queries, units, totals_PQN, advance, metric_sqnorms
        )

    def score_captured(
        queries: list[QueryGradients], ids: np.ndarray, advance: Advance
    ) -> np.ndarray:
        return captured_scores(source, request, queries, ids, advance)

    products = PairProducts(bytes_per_query(source, request), read_queries, prepare, add)
    fused = score_captured if metric_sqnorms is None else None
    for ids, load, ranking in rank_by_gradients(source, request, new_ranking, products, fused):
        names = None if request.sum_queries else [int(query) for query in ids]
        rows = SplitRows(ids, load, ranking, map_queries, metric_sqnorms)
        yield ScoredQueries(names, ranking, request.parts, new_split(source, request, rows))


def bytes_per_query(source: GradientSource, request: ScoreRequest) -> int:
    """Bytes of one query's gradient at one checkpoint, in memory."""
    numbers = sum(map(source.settings.width, request.columns.values()))
    return numbers * max(4, source.settings.storage_dtype.itemsize)


@dataclass(frozen=True)
class QueryGradients:
    """The queries at one checkpoint: their gradients, columns that are multiplied as one joined.

    `counts`: see weights_and_parts. `inverse_Q`: 1 / norm. `smallest`: the smallest factor of the
    products, other than 0: a learning rate, the scale of a query.
    """

    counts: dict[Columns, tuple[float, int]]
    scaled: dict[Columns, ScaledQueries]
    inverse_Q: Tensor
    smallest: float

    @classmethod
    def of(
        cls,
        request: ScoreRequest,
        index: int,
        rows_QD: GradientRows,
        joins: bool,
        device: torch.device,
    ) -> "QueryGradients":
        """On the device, where they stay for all blocks of training examples."""
        counts = weights_and_parts(request, index, rows_QD.forms, joins)
        scaled = {
            names: ScaledQueries.of(joined([rows_QD.forms[name] for name in names])).to(device)
            for names in counts
        }
        scales = [query.scale_Q for query in scaled.values() if query.scale_Q is not None]
        factors = [abs(weight) for weight, _ in counts.values() if weight]
        smallest = min([1.0, *factors, *(float(scale_Q.min()) for scale_Q in scales)])
        return cls(counts, scaled, inverse_norms(rows_QD), smallest)


def add_products(
    device: torch.device,
    request: ScoreRequest,
    queries_QD: QueryGradients,
    units: Units,
    totals_PQN: Tensor,
    advance: Advance,
    metric_sqnorms: SquaredNorms | None = None,
) -> bool:
    """Add the products at one checkpoint to the scores of a block, and to their parts.
    `metric_sqnorms`: norms for --normalize, None for those of the rows.

    Each product is computed once and added in one order, so that exact scores are the same with
    and without parts. Returns whether any product is not 0, where scores may underflow.
    """
    place, any_product = totals_PQN.device, False
    counts, small = queries_QD.counts, queries_QD.smallest < SMALL
    first = 0
    for unit in units:
        extreme = extreme_rows(unit, counts)
        if metric_sqnorms is not None:
            unit = dataclasses.replace(unit, sqnorms=metric_sqnorms(unit))
        for at, rows in parts_of_unit(unit, counts, request.normalize, place):
            columns = totals_PQN[:, :, first + at.start : first + at.stop]
            inverses: tuple[Tensor, ...] = ()
            if request.normalize:
                inverses = inverse_norms(rows)[:, None], queries_QD.inverse_Q
            memo: Memo = {}
            for names, (weight, part) in counts.items():
                mask = extreme[names][at] if names in extreme else None
                form = rows.forms[names[0]]
                scaled = queries_QD.scaled[names]
                scores_NQ = inner_products(form, scaled, device, mask, memo).to(place)
                any_product = any_product or (small and bool(scores_NQ.any()))
                for factor in inverses:
                    scores_NQ = scores_NQ * factor.to(place)
                for index in {0, part}:
                    columns[index].add_(scores_NQ.T, alpha=weight)
            advance(len(rows.ids))
        first += len(unit.ids)
    return any_product


def captured_scores(
    source: GradientSource,
    request: ScoreRequest,
    queries: list[QueryGradients],
    ids: np.ndarray,
    advance: Advance,
) -> np.ndarray:
    """(1 + P, Q, N) float64: the scores of a block, then their parts, computed while gradients are
    captured. It keeps none of them. Raises InfluenceError where all scores underflow.
    """
    shape = 1 + len(request.parts), len(queries[0].inverse_Q), len(ids)
    totals_PQN = torch.zeros(shape, dtype=torch.float64)
    columns, any_small = list(request.columns), False
    for number, (checkpoint, queries_QD) in enumerate(
        zip(request.checkpoints, queries, strict=True), start=1
    ):
        products = FusedProducts(
            source,
            checkpoint,
            {names[0]: query for names, query in queries_QD.scaled.items()},
            {names[0]: counts for names, counts in queries_QD.counts.items()},
            queries_QD.inverse_Q if request.normalize else None,
            shape,
        )
        where = f"checkpoint {number} of {len(request.checkpoints)}"
        scores_PQN, any_product = products.scores(columns, ids, advance, where)
        totals_PQN = totals_PQN.to(scores_PQN.device).add_(scores_PQN)
        any_small = any_small or (any_product and queries_QD.smallest < SMALL)
    if any_small:
        refuse_underflow(float(totals_PQN[0].abs().max()), any_small)
    return totals_PQN.cpu().numpy()


def extreme_rows(
    unit: GradientRows, counts: dict[Columns, tuple[float, int]]
) -> dict[Columns, Tensor]:
    """Masks (N,) of the training gradients whose products need float64, where there are any."""
    groups = list(counts)
    sqnorms = [
        sum(unit.sqnorms[name] for name in names[1:]) + unit.sqnorms[names[0]] for names in groups
    ]
    extreme_CN = extreme_norms(torch.stack(sqnorms))
    numbers = extreme_CN.any(1).nonzero().flatten().tolist() if extreme_CN.any() else []
    return {groups[number]: extreme_CN[number] for number in numbers}


def weights_and_parts(
    request: ScoreRequest, index: int, forms: dict[str, Form], join: bool = True
) -> dict[Columns, tuple[float, int]]:
    """Columns that are multiplied as one, with their weight and the number of their part (0: none).

    Neighbouring projected columns of one weight and one part are joined; other columns are alone.
    """
    weight, step = request.weights[index], str(request.checkpoints[index].step)
    numbers = {name: number for number, name in enumerate(request.parts, start=1)}
    joins: list[tuple[list[str], tuple[float, int]]] = []
    for name, column in request.columns.items():
        part = numbers[step if request.by == "checkpoint" else column.layer] if numbers else 0
        counts = weight.of(column.names), part
        previous = joins[-1] if joins else None
        if (
            join
            and previous is not None
            and previous[1] == counts
            and isinstance(forms[name], Projected)
            and isinstance(forms[previous[0][0]], Projected)
        ):
            previous[0].append(name)
        else:
            joins.append(([name], counts))
    return {tuple(names): counts for names, counts in joins}


def parts_of_unit(
    unit: GradientRows,
    counts: dict[Columns, tuple[float, int]],
    normalize: bool,
    place: torch.device,
) -> Iterator[tuple[slice, GradientRows]]:
    """A unit with its joined columns side by side, in parts of a size that multiplies fast."""
    forms = {}
    for names in counts:
        columns = [unit.forms[name] for name in names]
        adjacent = side_by_side(columns)
        forms[names[0]] = adjacent if adjacent is not None else joined(columns)
    row_bytes = max(form.nbytes // len(form) for form in forms.values())
    small = place.type == "cpu" and row_bytes > WIDE_ROW_BYTES
    sqnorms = unit.sqnorms if normalize else {}
    whole_unit = dataclasses.replace(unit, forms=forms, sqnorms=sqnorms)
    first = 0
    for part in whole_unit.parts(SMALL_PART if small else UNIT_EXAMPLES):
        yield slice(first, first + len(part.ids)), part
        first += len(part.ids)


def joined(forms: list[Form]) -> Form:
    """Projected gradients of several columns as one, by a copy."""
    if len(forms) == 1:
        return forms[0]
    values = torch.cat([form.dense().values for form in forms], dim=1)
    return Projected((values.shape[1],), values)


def inverse_norms(rows: GradientRows) -> Tensor:
    """(N,) of 1/|g| over the selected parameters; 0 where a gradient is zero."""
    return inverse_of_norms(sum(rows.sqnorms.values(), torch.zeros(())).sqrt())
