"""Scores as inner products of gradients, summed over checkpoints: what tracin, grad-dot and
grad-cos share.

scores_QN = sum over checkpoints i of eta_i * query_grads_QD @ train_grads_ND.T

Letters: N train, Q query, P parts of a score, D gradient.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.store import UNIT_EXAMPLES
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import side_by_side
from influence_cli.gradients.forms import Form, Memo, Projected
from influence_cli.methods.pairwise import (
    Advance,
    RankingFactory,
    Units,
    dtype_of,
    mean_query_row,
    next_units,
    query_rows,
    rank_by_gradients,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest

SMALL_PART = 512  # training examples multiplied at once: their products stay in the CPU's cache
WIDE_ROW_BYTES = 8192  # rows from which that matters
Columns = tuple[str, ...]  # columns that are multiplied as one


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every requested training example, ranked per query."""
    numbers = sum(map(source.settings.width, request.columns.values()))
    query_bytes = numbers * max(4, source.settings.store.itemsize)
    rows_of = mean_query_row if request.sum_queries else query_rows

    def load_queries(ids: Ids) -> list[GradientRows]:
        return [rows_of(source, request, checkpoint, ids) for checkpoint in request.checkpoints]

    def score_block(
        queries: list[GradientRows], ids: np.ndarray, units: Units, advance: Advance
    ) -> np.ndarray:
        return block_scores(source.device, request, queries, ids, units, advance)

    for ids, _, ranking in rank_by_gradients(
        source, request, new_ranking, query_bytes, load_queries, score_block
    ):
        names = None if request.sum_queries else [int(query) for query in ids]
        yield ScoredQueries(names, ranking, request.parts)


def block_scores(
    device: torch.device,
    request: ScoreRequest,
    queries: list[GradientRows],
    ids: np.ndarray,
    units: Units,
    advance: Advance,
) -> np.ndarray:
    """(1 + P, Q, N) float64: the scores of a block, then their parts.

    Each product is computed once and added in one order, so that exact scores are the same with
    and without parts.
    """
    # Products are added in float64, which MPS lacks.
    place = device if device.type == "cuda" else torch.device("cpu")
    shape = 1 + len(request.parts), len(queries[0].losses), len(ids)
    totals_PQN = torch.zeros(shape, dtype=torch.float64, device=place)
    for number, rows_QD in enumerate(queries, start=1):
        counts = weights_and_parts(request, number - 1, rows_QD.forms)
        query = {
            names: joined([rows_QD.forms[name] for name in names]).to(device) for names in counts
        }
        first = 0
        for unit in next_units(units, len(ids)):
            for rows in parts_of_unit(unit, counts, request.normalize, place):
                last = first + len(rows.ids)
                scale_NQ = inverse_norms(rows, rows_QD).to(place) if request.normalize else None
                memo: Memo = {}
                for names, (weight, part) in counts.items():
                    form = rows.forms[names[0]]
                    scores_NQ = product(form, query[names], device, memo).to(place)
                    if scale_NQ is not None:
                        scores_NQ = scores_NQ * scale_NQ
                    for index in {0, part}:
                        totals_PQN[index, :, first:last].add_(scores_NQ.T, alpha=weight)
                first = last
                advance(len(rows.ids), f"checkpoint {number} of {len(request.checkpoints)}")
    return totals_PQN.cpu().numpy()


def weights_and_parts(
    request: ScoreRequest, index: int, forms: dict[str, Form]
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
            previous is not None
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
) -> Iterator[GradientRows]:
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
    return whole_unit.parts(SMALL_PART if small else UNIT_EXAMPLES)


def joined(forms: list[Form]) -> Form:
    """Projected gradients of several columns as one, by a copy."""
    if len(forms) == 1:
        return forms[0]
    values = torch.cat([form.dense().values for form in forms], dim=1)
    return Projected((values.shape[1],), values)


def product(rows_ND: Form, queries_QD: Form, device: torch.device, memo: Memo) -> Tensor:
    """(N, Q) inner products on the device, in the wider of the two precisions."""
    dtypes = dtype_of(rows_ND), dtype_of(queries_QD)
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return rows_ND.to(device, wide).dot(queries_QD.to(device, wide), memo)


def inverse_norms(rows: GradientRows, queries: GradientRows) -> Tensor:
    """(N, Q) of 1/(|g(z)| |g(q)|) over the selected parameters; 0 where a gradient is zero."""
    norms_N, norms_Q = (
        sum(side.sqnorms.values(), torch.zeros(())).sqrt() for side in (rows, queries)
    )
    norms_NQ: Tensor = norms_N[:, None] * norms_Q[None, :]
    return torch.where(norms_NQ > 0, 1 / norms_NQ, torch.zeros_like(norms_NQ))
