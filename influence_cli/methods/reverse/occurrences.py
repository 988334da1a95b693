"""Scores over training time, as steps are gone back over: collected from each step's entries, kept
so that a killed job goes on, summed and ranked.

N train, Q query, M occurrences, P parts of a score.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.errors import OutputError
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse.optimizer_adjoint import total
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.output.ranking import Entry
from influence_cli.storage.scratch import map_zeros

BLOCK = 4096  # training examples ranked at once
HELD_BYTES = 1 << 30  # scores held in memory; more lie in a temporary file


@dataclass
class Occurrences:
    """Scores of single occurrences: of `examples` (M,) at `steps` (M,), (M, Q) float64; an example
    twice in a step is two.
    """

    steps: np.ndarray
    examples: np.ndarray
    scores: Tensor
    filled: int = 0

    def add(self, step: int, examples: np.ndarray, scores: Tensor) -> None:
        at = slice(self.filled, self.filled + len(examples))
        self.steps[at], self.examples[at], self.scores[at] = step, examples, scores
        self.filled = at.stop

    def by_step(self, at: np.ndarray, query: int) -> dict[int, float]:
        """Step -> score of the occurrences at these positions, in their order; those of one step
        summed.
        """
        sums: dict[int, float] = {}
        for step, value in zip(
            self.steps[at].tolist(),
            self.scores[torch.from_numpy(at.copy()), query].tolist(),
            strict=True,
        ):
            sums[step] = sums.get(step, 0.0) + value
        return sums


@dataclass
class Trace:
    """Scores by step: of all entries of each step together, (T, Q) float64, and of each occurrence
    of some examples.
    """

    first: int
    sums: Tensor
    totals: "Totals"
    by: None = None

    def add(self, step: int, part: str, examples: np.ndarray, effects: dict[str, Tensor]) -> None:
        self.sums[step - self.first] += total(effects).cpu().double().sum(0)
        self.totals.add(step, part, examples, effects)

    def series(self, query: int, example: int | None) -> list[tuple[int, float]]:
        """(step, score) of a query, rising: of every step, or of those that an example was trained
        on.
        """
        if example is None:
            return list(enumerate(self.sums[:, query].tolist(), start=self.first))
        occurrences = self.totals.occurrences
        assert occurrences is not None
        return list(
            occurrences.by_step(
                np.flatnonzero(occurrences.examples == example)[::-1], query
            ).items()
        )


@dataclass
class Totals:
    """Scores of the ranked examples while steps are gone back over: (1 + P, N, Q) float64, the
    whole scores first, then their parts.
    """

    ids: Ids
    parts: list[str]
    by: str | None
    queries: int
    folder: Path
    occurrences: Occurrences | None = None
    scores: Tensor = field(init=False)
    place: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = scratch(
            self.folder, "totals", (1 + len(self.parts), len(self.ids), self.queries)
        )
        last = int(self.ids[-1]) + 1 if len(self.ids) else 0
        self.place = np.full(last, -1)
        self.place[np.asarray(self.ids, np.int64)] = np.arange(len(self.ids))

    def add(self, step: int, part: str, examples: np.ndarray, effects: dict[str, Tensor]) -> None:
        """(B, Q) scores of a step's entries, by part of the model or all as one."""
        ranked = examples < len(self.place)
        ranked[ranked] = self.place[examples[ranked]] >= 0
        if not ranked.any():
            return
        keep = torch.from_numpy(ranked)
        at = torch.from_numpy(self.place[examples[ranked]])
        selected = {name: value.cpu()[keep].double() for name, value in effects.items()}
        totals = total(selected)
        self.scores[0].index_add_(0, at, totals)
        for name, value in (
            selected.items()
            if self.by == "layer"
            else [(part, totals)]
            if self.by == "checkpoint"
            else []
        ):
            self.scores[1 + self.parts.index(name)].index_add_(0, at, value)
        if self.occurrences is not None:
            self.occurrences.add(step, examples[ranked], totals)


Sums = TypeVar("Sums", Totals, Trace)
New = Callable[[int, Path], Sums]  # (queries, a folder to spill to) -> what collects their scores


def score(
    question: ScoreRequest,
    new_ranking: RankingFactory,
    plan: ReversePlan,
    passes: "Callable[[New[Totals]], Iterator[tuple[Ids, Totals]]]",
) -> Iterator[ScoredQueries]:
    """Scores of every training example asked for, ranked per query. `passes` goes back over
    training for some queries at a time.
    """

    def new(width: int, folder: Path) -> Totals:
        parts = (
            [str(segment.checkpoint.step) for segment in plan.segments]
            if question.by == "checkpoint"
            else question.parts
        )
        occurrences = (
            empty_occurrences(plan, question.train, width, folder)
            if question.by == "step"
            else None
        )
        return Totals(question.train, parts, question.by, width, folder, occurrences)

    for ids, totals in passes(new):
        width = totals.queries
        ranking = new_ranking(width, len(totals.parts))
        scores = totals.scores
        if question.groups:
            sums = torch.zeros(
                scores.shape[0], len(question.groups.names), width, dtype=torch.float64
            )
            sums.index_add_(
                1, torch.from_numpy(question.groups.of[np.asarray(question.train)]), scores
            )
            ranking.add(
                np.arange(sums.shape[1]), sums[0].T.numpy(), sums[1:].transpose(1, 2).numpy()
            )
        else:
            for block in cut_ids(question.train, BLOCK):
                part = scores[:, torch.from_numpy(totals.place[block])].transpose(1, 2).numpy()
                ranking.add(block, part[0], part[1:])
        split = by_step(totals.occurrences, question) if totals.occurrences else None
        yield ScoredQueries(
            None if question.sum_queries else [int(i) for i in ids], ranking, totals.parts, split
        )


def trace(
    question: ScoreRequest,
    plan: ReversePlan,
    passes: "Callable[[New[Trace]], Iterator[tuple[Ids, Trace]]]",
) -> Iterator[tuple[Ids, Trace]]:
    """Per pass the queries' ids (one, with --sum-queries) and their scores over training time, of
    all steps and of `question.train`.
    """

    def new(width: int, folder: Path) -> Trace:
        occurrences = empty_occurrences(plan, question.train, width, folder)
        sums = torch.zeros(len(plan.steps), width, dtype=torch.float64)
        return Trace(
            plan.steps.start, sums, Totals(question.train, [], None, width, folder, occurrences)
        )

    yield from passes(new)


def by_step(
    occurrences: Occurrences, question: ScoreRequest
) -> Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]]:
    """Of each ranked pair its steps, rising, and their scores; of a group those of its members."""
    owner = (
        occurrences.examples
        if question.groups is None
        else question.groups.of[occurrences.examples]
    )
    order = np.lexsort((occurrences.steps, owner))
    owners = owner[order]

    def split(query: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        divided = []
        for entry in entries:
            at = slice(*np.searchsorted(owners, [entry.train, entry.train + 1]))
            divided.append(
                [
                    (str(step), value)
                    for step, value in occurrences.by_step(order[at], query).items()
                ]
            )
        return divided

    return split


def empty_occurrences(plan: ReversePlan, ids: Ids, queries: int, folder: Path) -> Occurrences:
    ranked = np.zeros(int(ids[-1]) + 1 if len(ids) else 0, dtype=bool)
    ranked[np.asarray(ids, np.int64)] = True
    count = 0
    for step in plan.steps:
        examples = plan.trajectory.lines[step].examples
        count += int(ranked[examples[examples < len(ranked)]].sum())
    return Occurrences(
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        scratch(folder, "occurrences", (count, queries)),
    )


def scratch(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Zeros, float64: in memory, or in a file where they are many."""
    count = int(torch.Size(shape).numel())
    if count * 8 <= HELD_BYTES:
        return torch.zeros(shape, dtype=torch.float64)
    try:
        return torch.from_numpy(map_zeros(folder / name, shape))
    except OSError as error:
        raise OutputError(
            f"{count * 8:,} bytes of scores have no place in {folder}: {error}",
            "TMPDIR names a folder on a larger disk",
        ) from error
