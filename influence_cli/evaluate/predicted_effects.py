"""What a method says that leaving an example out of one step would do: the part of its score that
is about that step.

R removals, Q queries.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.output.ranking import Entry, Ranking


class Removal(NamedTuple):
    """All entries of an example in one step."""

    step: int
    example: int


class PredictedEffects(Ranking):
    """Not ranked: every score as it came."""

    def __init__(self, queries: int, parts: int) -> None:
        super().__init__(queries, parts)
        self._ids = np.empty(0, np.int64)
        self._all = np.empty((1 + parts, queries, 0))  # scores, then their parts

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        totals = (
            scores[None]
            if parts is None or not self.parts
            else np.concatenate([scores[None], parts])
        )
        self._ids, self._all = (
            np.concatenate([self._ids, ids]),
            np.concatenate([self._all, totals], axis=2),
        )

    def entries(self, query: int) -> Iterator[Entry]:
        for at in np.argsort(self._ids, kind="stable"):
            scores = self._all[:, query, at].tolist()
            yield Entry(
                "opponent" if scores[0] < 0 else "proponent",
                1 + int(at),
                int(self._ids[at]),
                scores[0],
                tuple(scores[1:]),
            )

    def of(self, example: int, part: int) -> np.ndarray:
        """(Q,) the score of an example, or a part of it counted from 1."""
        return self._all[part, :, np.flatnonzero(self._ids == example)[0]]


def scores(
    gradients: GradientSource, method: Method, question: ScoreRequest, removals: Sequence[Removal]
) -> np.ndarray:
    """(R, Q). Of the score by step where the method has it; else of the part of the checkpoint from
    which the step went on; else all.
    """
    by = next((part for part in ("step", "checkpoint") if part in method.parts), None)
    examples = np.unique([removal.example for removal in removals])
    question = dataclasses.replace(question, train=examples, by=by)
    names = [part_of(removal, question) for removal in removals]
    return np.concatenate(
        [
            of_answer(answer, removals, names)
            for answer in method.score(gradients, question, PredictedEffects)
        ],
        axis=1,
    )


def part_of(removal: Removal, question: ScoreRequest) -> str | None:
    """The name of the part that is about this removal: its step, or the checkpoint before it (the
    first, where none is).
    """
    if question.by == "checkpoint":
        steps = [checkpoint.step for checkpoint in question.checkpoints]
        return str(steps[max(0, int(np.searchsorted(steps, removal.step, side="right")) - 1)])
    return str(removal.step) if question.by == "step" else None


def of_answer(
    answer: ScoredQueries, removals: Sequence[Removal], names: Sequence[str | None]
) -> np.ndarray:
    """(R, Q) of the queries of one answer. An example that stood in a step several times has
    several parts there; they add.
    """
    ranking = answer.ranking
    assert isinstance(ranking, PredictedEffects)
    if answer.split is None:
        parts = [0 if name is None else 1 + answer.parts.index(name) for name in names]
        return np.array(
            [
                ranking.of(removal.example, part)
                for removal, part in zip(removals, parts, strict=True)
            ]
        )
    effects = np.zeros((len(removals), ranking.queries))
    for query in range(ranking.queries):
        entries = list(ranking.entries(query))
        sums: dict[tuple[int, str], float] = {}
        for entry, pieces in zip(entries, answer.split(query, entries), strict=True):
            for part, score in pieces:
                sums[entry.train, part] = sums.get((entry.train, part), 0.0) + score
        effects[:, query] = [
            sums.get((removal.example, name or ""), 0.0)
            for removal, name in zip(removals, names, strict=True)
        ]
    return effects
