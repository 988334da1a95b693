"""Ranks or traces the sums of a reverse pass: what dve and unroll return.

Letters: N train, Q query, P parts of a score, G groups.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import Groups, ScoredQueries, ScoreRequest
from influence_cli.methods.reverse.occurrences import (
    NewSums,
    Occurrences,
    ScoreSums,
    Trace,
    empty_occurrences,
)
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.stability import check_finite
from influence_cli.output.ranking import Entry, Ranking, refuse_non_finite

BLOCK = 4096  # training examples that a ranking receives at once
ScorePasses = Callable[[NewSums[ScoreSums]], Iterator[tuple[Ids, ScoreSums]]]
TracePasses = Callable[[NewSums[Trace]], Iterator[tuple[Ids, Trace]]]


def rank_scores(
    request: ScoreRequest, new_ranking: RankingFactory, plan: ReversePlan, run_passes: ScorePasses
) -> Iterator[ScoredQueries]:
    """Scores of all requested training examples, ranked per query."""

    def new_sums(queries: int, folder: Path) -> ScoreSums:
        parts = request.parts
        if request.by == "checkpoint":
            parts = [str(segment.checkpoint.step) for segment in plan.segments]
        occurrences = None
        if request.by == "step":
            occurrences = empty_occurrences(plan, request.train, queries, folder)
        return ScoreSums(request.train, parts, request.by, queries, folder, occurrences)

    for ids, sums in run_passes(new_sums):
        ranking = new_ranking(sums.queries, len(sums.parts))
        if request.groups:
            add_groups(ranking, sums, request.groups, request.train)
        else:
            add_examples(ranking, sums, request.train)
        split = split_by_step(sums.occurrences, request.groups) if sums.occurrences else None
        queries = None if request.sum_queries else [int(query) for query in ids]
        yield ScoredQueries(queries, ranking, sums.parts, split)


def add_examples(ranking: Ranking, sums: ScoreSums, train: Ids) -> None:
    """Add the scores of training examples to a ranking, block by block."""
    for ids in cut_ids(train, BLOCK):
        places = torch.from_numpy(sums.place[ids])
        scores_PQN = sums.scores[:, places].transpose(1, 2).numpy()
        ranking.add(ids, scores_PQN[0], scores_PQN[1:])


def add_groups(ranking: Ranking, sums: ScoreSums, groups: Groups, train: Ids) -> None:
    """Add the summed scores of groups of training examples to a ranking."""
    parts, _, queries = sums.scores.shape
    scores_PGQ = torch.zeros(parts, len(groups.names), queries, dtype=torch.float64)
    group_of_N = torch.from_numpy(groups.of[np.asarray(train)])
    scores_PGQ.index_add_(1, group_of_N, sums.scores)
    scores_PQG = scores_PGQ.transpose(1, 2).numpy()
    ranking.add(np.arange(len(groups.names)), scores_PQG[0], scores_PQG[1:])


def trace_scores(
    request: ScoreRequest, plan: ReversePlan, run_passes: TracePasses
) -> Iterator[tuple[Ids, Trace]]:
    """Per pass its query ids (one with --sum-queries) and their scores over training time.

    The scores are those of all steps, and of the occurrences of `request.train`.
    """

    def new_sums(queries: int, folder: Path) -> Trace:
        occurrences = empty_occurrences(plan, request.train, queries, folder)
        totals = ScoreSums(request.train, [], None, queries, folder, occurrences)
        sums = torch.zeros(len(plan.steps), queries, dtype=torch.float64)
        return Trace(plan.steps.start, sums, totals)

    for ids, trace in run_passes(new_sums):
        refuse_non_finite_trace(trace, plan)
        yield ids, trace


def refuse_non_finite_trace(trace: Trace, plan: ReversePlan) -> None:
    """Raise GradientError or NonFiniteScore where a sum over steps is NaN or infinite."""
    running_TQ = trace.sums.cumsum(0)
    if not running_TQ.isfinite().all():
        at = int((~running_TQ.isfinite()).any(1).nonzero()[0])
        step = plan.steps[at]
        check_finite(running_TQ[at], step, plan.segment_at(step).checkpoint.step)
    refuse_non_finite(np.asarray(trace.totals.ids), trace.totals.scores[0].T.numpy())


def split_by_step(
    occurrences: Occurrences, groups: Groups | None
) -> Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]]:
    """A function that splits ranked scores by step, rising; a group's score by all its members."""
    owner = occurrences.examples if groups is None else groups.of[occurrences.examples]
    order = np.lexsort((occurrences.steps, owner))
    owners = owner[order]

    def split(query: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        divided = []
        for entry in entries:
            rows = order[slice(*np.searchsorted(owners, [entry.train, entry.train + 1]))]
            scores = occurrences.by_step(rows, query)
            divided.append([(str(step), score) for step, score in scores.items()])
        return divided

    return split
