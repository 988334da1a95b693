"""What methods on cached rows share: the gradients of queries, and the loop: queries in passes, blocks of examples outside, checkpoints
inside, ranked as they come.

N train, Q query, P parts of a score.
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
from influence_cli.extraction.memory_budget import floor_power_of_two
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Dense, Form
from influence_cli.methods.request import Groups, ScoreRequest
from influence_cli.output.ranking import Ranking, Shareable
from influence_cli.parallel import Ranks
from influence_cli.run.checkpoints import Checkpoint

QUERY_BYTES = (
    2 << 30
)  # gradients of queries held at once, over all checkpoints; more queries go in several passes
TOTAL_BYTES = 16 << 20  # scores of a block of training examples
RankingFactory = Callable[[int, int], Ranking]  # (queries, parts) -> an empty ranking
Advance = Callable[..., None]
Units = Iterator[GradientRows]


def ranked(
    gradients: GradientSource,
    question: ScoreRequest,
    new_ranking: RankingFactory,
    query_bytes: int,
    load: Callable[[Ids], Any],
    scores: Callable[[Any, np.ndarray, Units, Advance], np.ndarray],
) -> Iterator[tuple[Ids, Any, Ranking]]:
    """Per pass its query ids, what `load` made of them, and their ranking. Memory: a block of scores, and the gradients of some queries.
    Of several ranks each takes its blocks, and rank 0 has what comes out.

    `query_bytes`: of one query at one checkpoint. `scores(queries, ids, units, advance)`: (1 + P, Q, N) float64, the scores and their
    parts, from the units of these ids at one checkpoint after the other.
    """
    gradients.ensure("query", question.checkpoints, list(question.columns), question.queries)
    gradients.ensure("train", question.checkpoints, list(question.columns), question.train)
    ranks, passes = gradients.ranks, query_passes(question, query_bytes)
    for number, ids in enumerate(passes, start=1):
        of = f", queries {number} of {len(passes)}" if len(passes) > 1 else ""
        with gradients.reporter.progress(
            f"scores{of}", len(question.train) * len(question.checkpoints) // ranks.count
        ) as advance:
            queries = load(ids)
            width, parts = 1 if question.sum_queries else len(ids), question.parts
            ranking = new_ranking(width, len(parts))
            groups = (
                np.zeros((len(parts) + 1, width, len(question.groups.names)))
                if question.groups
                else None
            )
            turns = in_turns(question.train, block_size(gradients, question, width), ranks.count)
            wanted = (
                (checkpoint, turn[ranks.rank])
                for turn in turns()
                if ranks.rank < len(turn)
                for checkpoint in question.checkpoints
            )
            units = gradients.read_each("train", wanted, list(question.columns))
            for turn in turns():
                block = turn[ranks.rank] if ranks.rank < len(turn) else None
                totals = scores(queries, block, units, advance) if block is not None else None
                if groups is not None and question.groups is not None:
                    sums = (
                        group_sums(question.groups, block, totals)
                        if block is not None and totals is not None
                        else None
                    )
                    for found in ranks.gather(
                        sums
                    ):  # block by block, so that sums do not depend on the number of ranks
                        if found is not None:
                            groups[:, :, found[0]] += found[1]
                elif block is not None and totals is not None:
                    ranking.add(block, totals[0], totals[1:])
            if groups is not None:
                ranking.add(np.arange(groups.shape[2]), groups[0], groups[1:])
            else:
                unite(ranks, ranking)
        if ranks.rank == 0:
            yield ids, queries, ranking


def unite(ranks: Ranks, ranking: Ranking) -> None:
    """Rank 0's ranking takes in those of the others."""
    if ranks.count > 1:
        assert isinstance(ranking, Shareable)
        for parcel in ranks.collect(ranking.parcels()):
            ranking.take(parcel)


def in_turns(ids: Ids, size: int, count: int) -> Callable[[], Iterator[list[np.ndarray]]]:
    """Walks over the blocks of the ids, `count` at a time: one for each rank, in the last turn maybe fewer."""

    def turns() -> Iterator[list[np.ndarray]]:
        every = cut_ids(ids, size)
        while turn := list(itertools.islice(every, count)):
            yield turn

    return turns


def group_sums(
    groups: Groups, block: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The groups (G,) that a block has, and their sums (1 + P, Q, G) of its scores (1 + P, Q, N)."""
    there, number = np.unique(groups.of[block], return_inverse=True)
    sums = np.zeros((*totals.shape[:2], len(there)))
    np.add.at(sums.transpose(2, 0, 1), number, totals.transpose(2, 0, 1))
    return there, sums


def of_next(units: Units, count: int) -> Units:
    """The units of the next `count` examples."""
    done = 0
    while done < count:
        rows = next(units)
        done += len(rows.ids)
        yield rows


def query_passes(question: ScoreRequest, query_bytes: int) -> list[Ids]:
    """The queries, cut so that the gradients of each cut fit into QUERY_BYTES over all checkpoints, and its scores of the smallest block
    into 8 TOTAL_BYTES; uncut with --sum-queries."""
    fit = min(
        QUERY_BYTES // (query_bytes * len(question.checkpoints)),
        8 * TOTAL_BYTES // (4096 * 8 * (1 + len(question.parts))),
    )
    most = len(question.queries) if question.sum_queries else max(1, fit)
    return [
        question.queries[first : first + most] for first in range(0, len(question.queries), most)
    ]


def block_size(
    gradients: GradientSource, question: ScoreRequest, queries: int, level: Level = "values"
) -> int:
    """Training examples whose scores are held at once: some for each query, whole units, and few enough that several ranks have work."""
    held = TOTAL_BYTES // (8 * queries * (1 + len(question.parts)))
    shared = min(floor_power_of_two(held), floor_power_of_two(len(question.train) // 64))
    return max(
        min(4096, floor_power_of_two(4 * queries)),
        256,
        gradients.budget.unit_size("train", list(question.columns), level),
        shared,
    )


def query_rows(
    gradients: GradientSource, question: ScoreRequest, checkpoint: Checkpoint, ids: Ids
) -> GradientRows:
    """The queries' gradients at one checkpoint, all in memory, each in the form in which products cost least."""
    rows = concat_rows(list(gradients.read("query", checkpoint, list(question.columns), ids)))
    return dataclasses.replace(
        rows, forms={name: form.ready() for name, form in rows.forms.items()}
    )


def mean_query_row(
    gradients: GradientSource, question: ScoreRequest, checkpoint: Checkpoint, ids: Ids
) -> GradientRows:
    """--sum-queries: the mean of the queries' gradients at one checkpoint as one row, summed in float64 as they are read."""
    sums: dict[str, Tensor] = {}
    kept: dict[str, torch.dtype] = {}
    for rows in gradients.read("query", checkpoint, list(question.columns), ids):
        ones = torch.ones(len(rows.ids), 1, dtype=torch.float64)
        for name, form in rows.forms.items():
            part, kept[name] = form.to(form.device, torch.float64).rmatvec(ones).T, dtype_of(form)
            sums[name] = sums[name] + part if name in sums else part
    forms: dict[str, Form] = {
        name: Dense(question.columns[name].shape, (value / len(ids)).to(kept[name]))
        for name, value in sums.items()
    }
    one = torch.zeros(1, dtype=torch.float64)
    return GradientRows(
        np.zeros(1, np.int64),
        one,
        one,
        {name: form.sqnorm() for name, form in forms.items()},
        forms,
    )


def dtype_of(form: Form) -> torch.dtype:
    return next(value.dtype for value in form.tensors().values() if value.is_floating_point())
