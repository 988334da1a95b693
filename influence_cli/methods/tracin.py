"""TracIn (Pruthi et al. 2020, arXiv:2002.08484, TracInCP), its neighbours GradDot and GradCos on the same rows, and self-influence.

score(z, q) = sum over checkpoints i of eta_i g_i(z) . g_i(q). With g the gradient of a loss, score > 0: proponent, z lowered the
query's loss. eta enters once. GradDot is one checkpoint with eta = 1, GradCos the same with unit gradients.

N train, Q query, P parts of a score.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.cache.store import UNIT_EXAMPLES
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import side_by_side
from influence_cli.gradients.forms import Form, Memo, Projected
from influence_cli.methods.pairwise import (
    Advance,
    RankingFactory,
    Units,
    block_size,
    dtype_of,
    mean_query_row,
    of_next,
    query_rows,
    ranked,
    unite,
)
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.output.ranking import Ranking

PART = 512  # training examples multiplied at once: their products stay in the cache
THIN = 8192  # bytes of a row from which that counts


def score(
    gradients: GradientSource, question: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every training example asked for, ranked per query."""
    numbers = sum(map(gradients.settings.width, question.columns.values()))
    rows_of = mean_query_row if question.sum_queries else query_rows

    def load(ids: Ids) -> list[GradientRows]:
        return [
            rows_of(gradients, question, checkpoint, ids) for checkpoint in question.checkpoints
        ]

    def scores(
        queries: list[GradientRows], ids: np.ndarray, units: Units, advance: Advance
    ) -> np.ndarray:
        return block_scores(gradients.device, question, queries, ids, units, advance)

    for ids, _, ranking in ranked(
        gradients,
        question,
        new_ranking,
        numbers * max(4, gradients.settings.store.itemsize),
        load,
        scores,
    ):
        yield ScoredQueries(
            None if question.sum_queries else [int(i) for i in ids], ranking, question.parts
        )


def block_scores(
    device: torch.device,
    question: ScoreRequest,
    queries: list[GradientRows],
    ids: np.ndarray,
    units: Units,
    advance: Advance,
) -> np.ndarray:
    """(1 + P, Q, N) float64: the scores of a block, then their parts. Each product is taken once and added in one order, so that exact
    scores are the same with and without parts; projected gradients that count alike are multiplied at once."""
    part_of = {name: number for number, name in enumerate(question.parts, start=1)}
    place = (
        device if device.type == "cuda" else torch.device("cpu")
    )  # where products are added up; MPS has no float64
    totals = torch.zeros(
        1 + len(part_of), len(queries[0].losses), len(ids), dtype=torch.float64, device=place
    )
    for k, (checkpoint, weight) in enumerate(
        zip(question.checkpoints, question.weights, strict=True)
    ):
        parts = {name: part_of[str(checkpoint.step) if question.by == "checkpoint" else column.layer] if part_of else 0
                 for name, column in question.columns.items()}  # fmt: skip
        alike = groups(
            {
                name: (weight.of(column.names), parts[name])
                for name, column in question.columns.items()
            },
            queries[k].forms,
        )
        query = {
            names: joined([queries[k].forms[name] for name in names]).to(device) for names in alike
        }
        done = 0
        for unit in of_next(units, len(ids)):
            stacks = {names: side_by_side([unit.forms[name] for name in names]) for names in alike}
            together = {
                names[0]: form if form is not None else joined([unit.forms[n] for n in names])
                for names, form in stacks.items()
            }
            numbers = max(form.nbytes // len(form) for form in together.values())
            norms = unit.sqnorms if question.normalize else {}
            for rows in dataclasses.replace(unit, forms=together, sqnorms=norms).parts(
                part_size(numbers, place)
            ):
                at = slice(done, done + len(rows.ids))
                done = at.stop
                scale = inverse_norms(rows, queries[k]).to(place) if question.normalize else None
                memo: Memo = {}
                for names, (alpha, part) in alike.items():
                    found = product(rows.forms[names[0]], query[names], device, memo).to(place)
                    found = found if scale is None else found * scale
                    for number in {0, part}:
                        totals[number, :, at].add_(found.T, alpha=alpha)
                advance(len(rows.ids), f"checkpoint {k + 1} of {len(question.checkpoints)}")
    return totals.cpu().numpy()


def part_size(row_bytes: int, place: torch.device) -> int:
    """Training examples multiplied at once: rows of few numbers by the thousand."""
    return PART if place.type == "cpu" and row_bytes > THIN else UNIT_EXAMPLES


def groups(
    count_as: dict[str, tuple[float, int]], forms: dict[str, Form]
) -> dict[tuple[str, ...], tuple[float, int]]:
    """Columns whose products are taken at once, with their weight and part: neighbours that are projected and count alike; others alone."""
    found: list[tuple[list[str], tuple[float, int]]] = []
    for name, counts in count_as.items():
        thin = isinstance(forms[name], Projected)
        if (
            thin
            and found
            and found[-1][1] == counts
            and isinstance(forms[found[-1][0][0]], Projected)
        ):
            found[-1][0].append(name)
        else:
            found.append(([name], counts))
    return {tuple(names): counts for names, counts in found}


def joined(forms: list[Form]) -> Form:
    """Projected gradients of several columns as one, by a copy."""
    if len(forms) == 1:
        return forms[0]
    values = torch.cat([form.dense().values for form in forms], dim=1)
    return Projected((values.shape[1],), values)


def product(rows: Form, queries: Form, device: torch.device, memo: Memo) -> Tensor:
    """(N, Q) inner products on the device, in the wider of the two precisions."""
    wide = torch.float64 if torch.float64 in (dtype_of(rows), dtype_of(queries)) else torch.float32
    return rows.to(device, wide).dot(queries.to(device, wide), memo)


def inverse_norms(rows: GradientRows, queries: GradientRows) -> Tensor:
    """(N, Q) of 1/(|g(z)| |g(q)|) over the selected parameters, from the exact norms; 0 where a gradient is zero."""
    ours, theirs = (sum(part.sqnorms.values(), torch.zeros(())).sqrt() for part in (rows, queries))
    norms: Tensor = ours[:, None] * theirs[None, :]
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def self_influence(gradients: GradientSource, question: ScoreRequest, ranking: Ranking) -> None:
    """sum over checkpoints of eta_i |g_i(z)|^2, from the exact norms alone: high for mislabelled and atypical examples (section 4.1).
    Of several ranks, rank 0 has the whole ranking."""
    columns = list(question.columns)
    gradients.ensure("train", question.checkpoints, columns, question.train, "norms")
    ranks = gradients.ranks
    with gradients.reporter.progress(
        "self-influence", len(question.train) * len(question.checkpoints) // ranks.count
    ) as advance:
        every = cut_ids(question.train, block_size(gradients, question, 1, "norms"))
        for block in itertools.islice(every, ranks.rank, None, ranks.count):
            totals = np.zeros(len(block))
            for checkpoint, weight in zip(question.checkpoints, question.weights, strict=True):
                done = 0
                for rows in gradients.read("train", checkpoint, columns, block, "norms"):
                    for name, column in question.columns.items():
                        totals[done : done + len(rows.ids)] += (
                            weight.of(column.names) * rows.sqnorms[name].numpy()
                        )
                    done += len(rows.ids)
                    advance(len(rows.ids))
            ranking.add(block, totals[None])
        unite(ranks, ranking)
