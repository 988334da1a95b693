"""Sums of effects over the steps of a reverse pass: per example, per step, per occurrence.

Letters: B entries of a batch, N train, Q query, M occurrences, P parts of a score, T steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import OutputError
from influence_cli.methods.reverse.removal_effects import sum_parameters
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import StepEffects
from influence_cli.storage.scratch import map_zeros

MEMORY_BYTES = 1 << 30  # scores in memory; a larger tensor is in a temporary file


@dataclass
class Occurrences:
    """Scores of single occurrences: of `examples` (M,) at `steps` (M,), `scores` (M, Q) float64.

    An example that is twice in a step is two occurrences.
    """

    steps: np.ndarray
    examples: np.ndarray
    scores: Tensor
    filled: int = 0

    def add(self, step: int, examples: np.ndarray, scores_BQ: Tensor) -> None:
        rows = slice(self.filled, self.filled + len(examples))
        self.steps[rows], self.examples[rows], self.scores[rows] = step, examples, scores_BQ
        self.filled = rows.stop

    def by_step(self, rows: np.ndarray, query: int) -> dict[int, float]:
        """Step -> summed score of these occurrences, in their order."""
        sums: dict[int, float] = {}
        scores = self.scores[torch.from_numpy(rows.copy()), query].tolist()
        for step, score in zip(self.steps[rows].tolist(), scores, strict=True):
            sums[step] = sums.get(step, 0.0) + score
        return sums


@dataclass
class ScoreSums:
    """Scores of the ranked examples, summed over steps: (1 + P, N, Q) float64.

    The first of them are the scores, the others their parts. `by`: what splits a score.
    """

    ids: Ids
    parts: list[str]
    by: str | None
    queries: int
    folder: Path
    occurrences: Occurrences | None = None
    scores: Tensor = field(init=False)
    place: np.ndarray = field(init=False)  # id -> position among the ranked examples, or -1

    def __post_init__(self) -> None:
        shape = (1 + len(self.parts), len(self.ids), self.queries)
        self.scores = zeros(self.folder / "totals", shape)
        self.place = np.full(int(self.ids[-1]) + 1 if len(self.ids) else 0, -1)
        self.place[np.asarray(self.ids, np.int64)] = np.arange(len(self.ids))

    def add(self, effects: StepEffects) -> None:
        """Add the effects of a step, of the examples that are ranked."""
        ranked_B = effects.examples < len(self.place)
        ranked_B[ranked_B] = self.place[effects.examples[ranked_B]] >= 0
        if not ranked_B.any():
            return
        keep = torch.from_numpy(ranked_B)
        examples = effects.examples[ranked_B]
        at = torch.from_numpy(self.place[examples])
        selected = {name: value.cpu()[keep].double() for name, value in effects.values.items()}
        totals = sum_parameters(selected)
        self.scores[0].index_add_(0, at, totals)
        for name, value in self.split(effects.checkpoint, selected, totals).items():
            self.scores[1 + self.parts.index(name)].index_add_(0, at, value)
        if self.occurrences is not None:
            self.occurrences.add(effects.step, examples, totals)

    def split(
        self, checkpoint: int, by_layer: dict[str, Tensor], totals: Tensor
    ) -> dict[str, Tensor]:
        """Part -> its effects in this step."""
        if self.by == "layer":
            return by_layer
        return {str(checkpoint): totals} if self.by == "checkpoint" else {}


@dataclass
class Trace:
    """Scores by step: of each step's batch, `sums` (T, Q) float64, and of single occurrences."""

    first: int
    sums: Tensor
    totals: ScoreSums

    def add(self, effects: StepEffects) -> None:
        self.sums[effects.step - self.first] += sum_parameters(effects.values).cpu().double().sum(0)
        self.totals.add(effects)

    def series(self, query: int, example: int | None) -> list[tuple[int, float]]:
        """(step, score) of a query, rising: of each step's batch, or of an example's steps."""
        if example is None:
            return list(enumerate(self.sums[:, query].tolist(), start=self.first))
        occurrences = self.totals.occurrences
        assert occurrences is not None
        rows = np.flatnonzero(occurrences.examples == example)[::-1]
        return list(occurrences.by_step(rows, query).items())


Sums = TypeVar("Sums", ScoreSums, Trace)
NewSums = Callable[[int, Path], Sums]  # (queries, folder for temporary files) -> empty sums


def empty_occurrences(plan: ReversePlan, ids: Ids, queries: int, folder: Path) -> Occurrences:
    """Space for the occurrences of these examples in the steps of a plan."""
    ranked = np.zeros(int(ids[-1]) + 1 if len(ids) else 0, dtype=bool)
    ranked[np.asarray(ids, np.int64)] = True
    count = 0
    for step in plan.steps:
        examples = plan.trajectory.lines[step].examples
        count += int(ranked[examples[examples < len(ranked)]].sum())
    return Occurrences(
        np.empty(count, np.int64),
        np.empty(count, np.int64),
        zeros(folder / "occurrences", (count, queries)),
    )


def zeros(path: Path, shape: tuple[int, ...]) -> Tensor:
    """Zeros, float64: in memory, or in the file `path` if they exceed MEMORY_BYTES."""
    count = int(torch.Size(shape).numel())
    if count * 8 <= MEMORY_BYTES:
        return torch.zeros(shape, dtype=torch.float64)
    try:
        return torch.from_numpy(map_zeros(path, shape))
    except OSError as error:
        raise OutputError(
            f"{count * 8:,} bytes of scores can't be written to {path.parent}: {error.strerror}",
            "set TMPDIR to a folder on a larger disk",
        ) from error
