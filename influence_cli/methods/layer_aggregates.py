"""--aggregate rank|vote: one score from the scores of all layers, by their order alone
(arXiv:2511.04715).

A layer whose scores are large does not outweigh the others, as it does in their sum. In each layer
rank 1 is the lowest score, N the highest; ties share their mean rank.

rank:   score(z) = mean over layers of rank(z) / N - 1/2
vote:k  score(z) = number of layers with z in their top k - number with z in their bottom k

Score > 0: proponent. In `self`, the higher the more suspect. Where equal scores begin inside the
top k and end outside it, none of them gets a vote, so at most k get one.

Letters: N train, Q query, L layers, R rows (of layers, and what else an example has).
"""

import dataclasses
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.output.ranking import Entry, MergeableRanking, Ranking, refuse_non_finite
from influence_cli.storage.scratch import ScratchFolder, spill_arrays

if TYPE_CHECKING:
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.declaration import Method
    from influence_cli.methods.pairwise import RankingFactory
    from influence_cli.methods.request import ScoredQueries, ScoreRequest

SPILL_BYTES = 64 << 20  # scores of layers that stay in memory
VOTES = 10  # k, where --aggregate vote names none


@dataclass(frozen=True)
class Aggregate:
    """`kind`: rank or vote. `votes`: k of vote:k."""

    kind: str
    votes: int = VOTES

    def __str__(self) -> str:
        return f"vote:{self.votes}" if self.kind == "vote" else self.kind

    def points(self, scores_N: np.ndarray) -> np.ndarray:
        """(N,) int64: what a layer adds to the score, in units of 1 / `unit`. Integers, so that
        equal scores stay equal whatever the order of the layers.
        """
        count = len(scores_N)
        rising_N = np.sort(scores_N)
        below_N = np.searchsorted(rising_N, scores_N, "left")  # lower scores
        up_to_N = np.searchsorted(rising_N, scores_N, "right")  # lower or equal scores
        if self.kind == "rank":  # of equal scores: ranks below + 1 to up_to, twice their mean
            return (below_N + up_to_N + 1 - count).astype(np.int64)
        top_N, bottom_N = count - below_N <= self.votes, up_to_N <= self.votes
        return top_N.astype(np.int64) - bottom_N

    def unit(self, examples: int, layers: int) -> int:
        return 2 * examples * layers if self.kind == "rank" else 1

    def check_examples(self, count: int) -> None:
        """Raise UsageProblem where all examples would be in the top k and in the bottom k."""
        if self.kind == "vote" and count <= self.votes:
            raise UsageProblem(
                f"--aggregate {self}: all of {count:,} training examples or groups would be in "
                f"the top {self.votes} and in the bottom {self.votes}",
                f"expected: k below {count:,}",
                f"--aggregate vote:{max(1, count // 4)}, or --aggregate rank",
            )


class LayerScores:
    """The scores of all examples in each layer, float64: in memory, or in a temporary folder.

    float32 would make ties of scores that differ, and zeros of small ones.
    """

    def __init__(self, rows: int, queries: int) -> None:
        self.rows, self.queries = rows, queries
        self._folder: ScratchFolder | None = None
        self._file_ids: list[np.ndarray] = []  # the ids of each file
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, ids: np.ndarray, scores_RQN: np.ndarray) -> None:
        """Add a block. Raises NonFiniteScore; OutputError: no room on the disk."""
        for scores_QN in scores_RQN:
            refuse_non_finite(ids, scores_QN)
        self._pending.append((ids.copy(), scores_RQN.copy()))
        if sum(scores.nbytes for _, scores in self._pending) >= SPILL_BYTES:
            self._spill()

    def _spill(self) -> None:
        """Write the pending blocks into a file."""
        ids = np.concatenate([ids for ids, _ in self._pending])
        scores_RQN = np.concatenate([scores for _, scores in self._pending], axis=2)
        try:
            self._folder = self._folder or ScratchFolder(Path(tempfile.gettempdir()))
            spill_arrays(self._path(len(self._file_ids)), scores_RQN)
        except OSError as error:
            raise OutputError(
                f"--aggregate can't write to {tempfile.gettempdir()}: {error.strerror or error}",
                f"it needs {8 * self.rows} bytes per pair of a block of queries",
                "name a folder on a larger disk: TMPDIR=FOLDER",
            ) from error
        self._file_ids.append(ids)
        self._pending = []

    def _path(self, file: int) -> Path:
        assert self._folder is not None
        return self._folder.path / f"{file}"

    @property
    def ids(self) -> np.ndarray:
        """(N,), in the order of arrival."""
        return np.concatenate([*self._file_ids, *(ids for ids, _ in self._pending)])

    def scores(self, row: int, query: int) -> np.ndarray:
        """(N,) of one row and query, in the order of `ids`."""
        parts = []
        for file, ids in enumerate(self._file_ids):
            offset = 8 * len(ids) * (row * self.queries + query)
            parts.append(np.fromfile(self._path(file), np.float64, len(ids), offset=offset))
        return np.concatenate([*parts, *(scores[row, query] for _, scores in self._pending)])

    def blocks(self) -> Iterator[list[np.ndarray]]:
        """All blocks, to be sent to another rank: ids, and scores (R, Q, N)."""
        for file, ids in enumerate(self._file_ids):
            scores = np.fromfile(self._path(file), np.float64)
            yield [ids, scores.reshape(self.rows, self.queries, len(ids))]
        yield from ([ids, scores] for ids, scores in self._pending)

    def aggregate(
        self, rule: Aggregate, layers: int, query: int, by_layer: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N,) scores from the first `layers` rows; and their parts, (L, N) with `by_layer`,
        else (0, N).
        """
        count = len(self.ids)
        sums_N, parts = np.zeros(count, np.int64), np.empty((layers if by_layer else 0, count))
        unit = rule.unit(count, layers)
        for layer in range(layers):
            points_N = rule.points(self.scores(layer, query))
            sums_N += points_N
            if by_layer:
                parts[layer] = points_N / unit
        return sums_N / unit, parts


class LayerRanking(MergeableRanking):
    """Ranks by what an aggregate makes of the layers' scores, when all of them have arrived."""

    def __init__(
        self, queries: int, layers: int, rule: Aggregate, by_layer: bool, new: "RankingFactory"
    ) -> None:
        """`by_layer`: entries have a part for each layer. `new`: the ranking of one query."""
        super().__init__(queries, layers)
        self.rule, self.by_layer, self._new = rule, by_layer, new
        self._layer_scores = LayerScores(layers, queries)

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        assert parts is not None
        self._layer_scores.add(ids, parts)

    def export_partials(self) -> Iterator[list[np.ndarray]]:
        return self._layer_scores.blocks()

    def import_partial(self, partial: list[np.ndarray]) -> None:
        self._layer_scores.add(*partial)

    def entries(self, query: int) -> Iterator[Entry]:
        scores_N, parts_LN = self._layer_scores.aggregate(
            self.rule, self.parts, query, self.by_layer
        )
        ranking = self._new(1, len(parts_LN))
        ranking.add(self._layer_scores.ids, scores_N[None], parts_LN[:, None])
        return ranking.entries(0)


def score_layers(
    method: "Method",
    source: "GradientSource",
    request: "ScoreRequest",
    new_ranking: "RankingFactory",
    rule: Aggregate | None,
) -> "Iterator[ScoredQueries]":
    """The method's ranked scores, aggregated over layers. None: their sums.

    Raises UsageProblem where there are too few examples to vote.
    """
    if rule is None:
        return method.score(source, request, new_ranking)
    rule.check_examples(len(request.groups.names if request.groups else request.train))

    def new_layer_ranking(queries: int, layers: int) -> Ranking:
        return LayerRanking(queries, layers, rule, request.by == "layer", new_ranking)

    return method.score(source, dataclasses.replace(request, by="layer"), new_layer_ranking)
