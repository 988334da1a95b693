"""What methods on cached rows share: the gradients of queries, and the loop: queries in passes, blocks of examples outside, checkpoints
inside, ranked as they come.

N train, Q query, P parts of a score.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.build import Gradients
from influence_cli.cache.cutting import Ids, blocks
from influence_cli.cache.store import Rows, concat_rows
from influence_cli.gradients.forms import Dense, Form
from influence_cli.methods import Question
from influence_cli.output.ranking import Ranking
from influence_cli.run import Checkpoint

QUERY_BYTES = 2 << 30  # gradients of queries held at once, over all checkpoints; more queries go in several passes
TOTAL_BYTES = 16 << 20  # scores of a block of training examples
NewRanking = Callable[[int, int], Ranking]  # (queries, parts) -> an empty ranking
Advance = Callable[..., None]
Units = Iterator[Rows]


def ranked(
    gradients: Gradients,
    question: Question,
    new_ranking: NewRanking,
    query_bytes: int,
    load: Callable[[Ids], Any],
    scores: Callable[[Any, np.ndarray, Units, Advance], np.ndarray],
) -> Iterator[tuple[Ids, Any, Ranking]]:
    """Per pass its query ids, what `load` made of them, and their ranking. Memory: a block of scores, and the gradients of some queries.

    `query_bytes`: of one query at one checkpoint. `scores(queries, ids, units, advance)`: (1 + P, Q, N) float64, the scores and their
    parts, from the units of these ids at one checkpoint after the other.
    """
    gradients.ensure("query", question.checkpoints, list(question.columns), question.queries)
    gradients.ensure("train", question.checkpoints, list(question.columns), question.train)
    passes = query_passes(question, query_bytes)
    for number, ids in enumerate(passes, start=1):
        of = f", queries {number} of {len(passes)}" if len(passes) > 1 else ""
        with gradients.talk.progress(f"scores{of}", len(question.train) * len(question.checkpoints)) as advance:
            queries = load(ids)
            width, parts = 1 if question.sum_queries else len(ids), question.parts
            ranking = new_ranking(width, len(parts))
            groups = np.zeros((len(parts) + 1, width, len(question.groups.names))) if question.groups else None
            size = block_size(width, len(parts))
            wanted = ((checkpoint, block) for block in blocks(question.train, size) for checkpoint in question.checkpoints)
            units = gradients.read_each("train", wanted, list(question.columns))
            for block in blocks(question.train, size):
                totals = scores(queries, block, units, advance)
                if groups is None or question.groups is None:
                    ranking.add(block, totals[0], totals[1:])
                else:
                    np.add.at(groups.transpose(2, 0, 1), question.groups.of[block], totals.transpose(2, 0, 1))
            if groups is not None:
                ranking.add(np.arange(groups.shape[2]), groups[0], groups[1:])
        yield ids, queries, ranking


def of_next(units: Units, count: int) -> Units:
    """The units of the next `count` examples."""
    done = 0
    while done < count:
        rows = next(units)
        done += len(rows.ids)
        yield rows


def query_passes(question: Question, query_bytes: int) -> list[Ids]:
    """The queries, cut so that the gradients of each cut fit into QUERY_BYTES over all checkpoints, and its scores of the smallest block
    into 8 TOTAL_BYTES; uncut with --sum-queries."""
    fit = min(QUERY_BYTES // (query_bytes * len(question.checkpoints)), 8 * TOTAL_BYTES // (4096 * 8 * (1 + len(question.parts))))
    most = len(question.queries) if question.sum_queries else max(1, fit)
    return [question.queries[first : first + most] for first in range(0, len(question.queries), most)]


def block_size(queries: int, parts: int) -> int:
    """Training examples whose scores are held at once; at least 4,096, so that rankings are merged rarely."""
    return max(4096, TOTAL_BYTES // (8 * queries * (1 + parts)) // 4096 * 4096)


def query_rows(gradients: Gradients, question: Question, checkpoint: Checkpoint, ids: Ids) -> Rows:
    """The queries' gradients at one checkpoint, all in memory, each in the form in which products cost least."""
    rows = concat_rows(list(gradients.read("query", checkpoint, list(question.columns), ids)))
    return dataclasses.replace(rows, forms={name: form.ready() for name, form in rows.forms.items()})


def mean_query_row(gradients: Gradients, question: Question, checkpoint: Checkpoint, ids: Ids) -> Rows:
    """--sum-queries: the mean of the queries' gradients at one checkpoint as one row, summed in float64 as they are read."""
    sums: dict[str, Tensor] = {}
    kept: dict[str, torch.dtype] = {}
    for rows in gradients.read("query", checkpoint, list(question.columns), ids):
        ones = torch.ones(len(rows.ids), 1, dtype=torch.float64)
        for name, form in rows.forms.items():
            part, kept[name] = form.to(form.device, torch.float64).rmatvec(ones).T, dtype_of(form)
            sums[name] = sums[name] + part if name in sums else part
    forms: dict[str, Form] = {name: Dense(question.columns[name].shape, (value / len(ids)).to(kept[name])) for name, value in sums.items()}
    one = torch.zeros(1, dtype=torch.float64)
    return Rows(np.zeros(1, np.int64), one, one, {name: form.sqnorm() for name, form in forms.items()}, forms)


def dtype_of(form: Form) -> torch.dtype:
    return next(value.dtype for value in form.tensors().values() if value.is_floating_point())
