"""What a method predicts for leaving an example out of one step: the part of its score that is
about that step.

Shape letters: R removals, P parts of a score, Q queries, N training examples.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.output.ranking import Entry, Ranking, refuse_non_finite


class Removal(NamedTuple):
    """All occurrences of an example in one step."""

    step: int
    example: int


class UnrankedScores(Ranking):
    """Keeps every score in memory, in the order of arrival."""

    def __init__(self, queries: int, parts: int) -> None:
        super().__init__(queries, parts)
        self._ids_N = np.empty(0, np.int64)
        self._scores_PQN = np.empty((1 + parts, queries, 0))  # part 0 is the complete score

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        refuse_non_finite(ids, scores)
        block_PQN = scores[None]
        if self.parts and parts is not None:
            block_PQN = np.concatenate([block_PQN, parts])
        self._ids_N = np.concatenate([self._ids_N, ids])
        self._scores_PQN = np.concatenate([self._scores_PQN, block_PQN], axis=2)

    def entries(self, query: int) -> Iterator[Entry]:
        """By training id; ranks count arrivals."""
        for at in np.argsort(self._ids_N, kind="stable"):
            score, *parts = self._scores_PQN[:, query, at].tolist()
            kind = "opponent" if score < 0 else "proponent"
            yield Entry(kind, 1 + int(at), int(self._ids_N[at]), score, tuple(parts))

    def score_of(self, example: int, part: int) -> np.ndarray:
        """(Q,) the score of an example (part 0), or a part of it, counted from 1."""
        return self._scores_PQN[part, :, np.flatnonzero(self._ids_N == example)[0]]


def predict_effects(
    source: GradientSource, method: Method, request: ScoreRequest, removals: Sequence[Removal]
) -> np.ndarray:
    """(R, Q): the part of the score for the step, if the method has parts by step.

    Else the part of the checkpoint before the step, else the complete score.
    """
    by = next((part for part in ("step", "checkpoint") if part in method.parts), None)
    examples = np.unique([removal.example for removal in removals])
    request = dataclasses.replace(request, train=examples, by=by)
    parts = [part_name(removal, request) for removal in removals]
    results = method.score(source, request, UnrankedScores)
    return np.concatenate([select_parts(scored, removals, parts) for scored in results], axis=1)


def part_name(removal: Removal, request: ScoreRequest) -> str | None:
    """The part that is about this removal: its step, or the checkpoint before it (the first one if
    no checkpoint is before it).
    """
    if request.by == "checkpoint":
        steps = [checkpoint.step for checkpoint in request.checkpoints]
        return str(steps[max(0, int(np.searchsorted(steps, removal.step, side="right")) - 1)])
    return str(removal.step) if request.by == "step" else None


def select_parts(
    scored: ScoredQueries, removals: Sequence[Removal], names: Sequence[str | None]
) -> np.ndarray:
    """(R, Q) parts of the scores of some queries.

    An example that occurs several times in a step has several parts there; they are added.
    """
    ranking = scored.ranking
    assert isinstance(ranking, UnrankedScores)
    pairs = list(zip(removals, names, strict=True))
    if scored.split is None:
        parts = [0 if name is None else 1 + scored.parts.index(name) for name in names]
        examples = [removal.example for removal in removals]
        return np.array([ranking.score_of(*pair) for pair in zip(examples, parts, strict=True)])
    effects_RQ = np.zeros((len(removals), ranking.queries))
    for query in range(ranking.queries):
        entries = list(ranking.entries(query))
        sums: dict[tuple[int, str], float] = {}
        for entry, parts_of_entry in zip(entries, scored.split(query, entries), strict=True):
            for part, score in parts_of_entry:
                sums[entry.train, part] = sums.get((entry.train, part), 0.0) + score
        effects_RQ[:, query] = [
            sums.get((removal.example, name or ""), 0.0) for removal, name in pairs
        ]
    return effects_RQ
