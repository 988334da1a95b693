"""Rankings of scores that arrive in blocks: the top k, or all pairs sorted on disk.

Memory does not grow with the number of examples. Pairs of equal score are in the order of their
training ids.

The ranks of a job and the shards of a job array rank different training examples each. One
function merges their partial rankings: `merge_partial_rankings`.

Shape letters: N examples of a block, Q queries, P parts of a score, M kept pairs.
"""

import heapq
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from influence_cli.errors import NonFiniteScore, OutputError
from influence_cli.storage.scratch import ScratchFolder, spill_arrays

KINDS = ("proponent", "opponent")
RUN_BYTES = 64 << 20  # scores that FullRanking sorts in memory at once
READ_ROWS = 1 << 17  # rows of all sorted runs in memory while they are merged

# (section, key, training id, content). A section has ranks of its own: the proponents or the
# opponents of a query. `key`: -score of a proponent, score of an opponent, so a smaller key ranks
# higher. Any: a section is a number or a tuple of numbers, a content what the caller likes.
SortablePair = tuple[Any, float, int, Any]


def merge_partial_rankings(
    partials: Iterable[Iterator[SortablePair]],
) -> Iterator[tuple[int, SortablePair]]:
    """Merge sorted partial rankings of different training examples into (rank, pair).

    Ranks start at 1 in each section. Holds one pair of each partial ranking in memory.
    """
    rank, section = 0, None
    for pair in heapq.merge(*partials):
        rank = rank + 1 if pair[0] == section else 1
        section = pair[0]
        yield rank, pair


class Entry(NamedTuple):
    """One ranked pair. `kind`: proponent (score >= 0) or opponent; `rank` from 1 within the query
    and kind; `parts` sum to `score`.
    """

    kind: str
    rank: int
    train: int
    score: float
    parts: tuple[float, ...] = ()


class RankedQueries(ABC):
    """The ranked training examples of `queries` queries. `is_top`: few of each query."""

    is_top = False

    def __init__(self, queries: int, parts: int) -> None:
        self.queries, self.parts = queries, parts

    @abstractmethod
    def entries(self, query: int) -> Iterator[Entry]:
        """Proponents by falling score, then opponents by rising score. `query`: its position."""


class Ranking(RankedQueries):
    """Ranks the training examples of all queries at once. Blocks come in any order, each training
    id once.
    """

    @abstractmethod
    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        """Add a block: ids (N,), scores (Q, N) float64, and their parts (P, Q, N)."""


class RankingSlice(RankedQueries):
    """Some neighbouring queries of a ranking, from its query `first` on."""

    def __init__(self, ranking: RankedQueries, first: int, queries: int) -> None:
        super().__init__(queries, ranking.parts)
        self.is_top = ranking.is_top
        self._ranking, self._first = ranking, first

    def entries(self, query: int) -> Iterator[Entry]:
        return self._ranking.entries(self._first + query)


def refuse_non_finite(ids: np.ndarray, scores: np.ndarray) -> None:
    """Raise NonFiniteScore where a score (Q, N) is NaN or infinite. All scores pass here."""
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(scores.sum()):
            return
    query, at = np.nonzero(~np.isfinite(scores))
    if len(query):  # else only the sum overflows
        raise NonFiniteScore(int(query[0]), int(ids[at[0]]), float(scores[query[0], at[0]]))


class MergeableRanking(Ranking):
    """A ranking that takes in the partial rankings of other ranks."""

    @abstractmethod
    def export_partials(self) -> Iterator[Any]:
        """This rank's partial rankings, to be sent to another rank. Any: a subclass knows its
        own.
        """

    @abstractmethod
    def import_partial(self, partial: Any) -> None:
        """Add a partial ranking of another rank, of the same queries and other examples."""


class SortedRanking(MergeableRanking):
    """A ranking of sorted partial rankings."""

    @abstractmethod
    def sorted_partials(self, query: int) -> Iterable[Iterator[SortablePair]]:
        """The partial rankings of a query. Section: 0 proponents, 1 opponents; content: parts."""

    def entries(self, query: int) -> Iterator[Entry]:
        merged = merge_partial_rankings(self.sorted_partials(query))
        for rank, (kind, key, train, parts) in merged:
            yield Entry(KINDS[kind], rank, train, key if kind else -key, parts)


@dataclass
class BestPairs:
    """The k best pairs of each query and one kind, by query, then falling value, then id.

    `queries`, `values`, `ids`: (M,); `parts`: (P, M). `values`: scores of proponents, -scores of
    opponents.
    """

    queries: np.ndarray
    values: np.ndarray
    ids: np.ndarray
    parts: np.ndarray

    def pairs(self, query: int, kind: int) -> Iterator[SortablePair]:
        """The pairs of a query, best first."""
        first, last = np.searchsorted(self.queries, [query, query + 1])
        for at in range(first, last):
            parts = tuple(self.parts[:, at].tolist()) if len(self.parts) else ()
            yield kind, -float(self.values[at]), int(self.ids[at]), parts


class TopRanking(SortedRanking):
    """The k highest scores above 0 and the k lowest below 0.

    With `signed` False: the k highest scores of any sign.
    """

    is_top = True

    def __init__(self, queries: int, parts: int, k: int, signed: bool = True) -> None:
        super().__init__(queries, parts)
        self.k, self.signed = k, signed
        empty = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), np.empty((parts, 0))
        self._best = [BestPairs(*empty) for _ in range(2 if signed else 1)]
        self._imported: list[list[BestPairs]] = []

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        refuse_non_finite(ids, scores)
        for kind, sign in enumerate((1, -1)[: len(self._best)]):
            bars = self._bars(kind, sign, scores)[:, None]
            # a score equal to its bar may still win by its id
            good = np.flatnonzero(scores >= bars if sign > 0 else scores <= -bars)
            query, at = np.divmod(good, scores.shape[1])
            if not len(at):
                continue
            good_parts = parts[:, query, at] if parts is not None else np.empty((0, len(at)))
            self._keep_best(kind, BestPairs(query, sign * scores[query, at], ids[at], good_parts))

    def _bars(self, kind: int, sign: int, scores: np.ndarray) -> np.ndarray:
        """(Q,): a value below its query's bar is not among the k best of the kept pairs, nor, if
        fewer than k are kept, of this block. Never sorts.
        """
        best, least = self._best[kind], max(0, scores.shape[1] - self.k)
        bars = np.full(self.queries, -np.inf)
        full = np.flatnonzero(np.bincount(best.queries, minlength=self.queries) == self.k)
        bars[full] = best.values[np.searchsorted(best.queries, full, side="right") - 1]
        not_full = np.flatnonzero(np.isneginf(bars))
        if len(not_full):
            bars[not_full] = np.partition(sign * scores[not_full], least, axis=1)[:, least]
        return np.maximum(bars, np.nextafter(0, 1)) if self.signed else bars

    def _keep_best(self, kind: int, new: BestPairs) -> None:
        """Keep the k best of the kept and the new pairs of each query."""
        best = self._best[kind]
        queries = np.concatenate([best.queries, new.queries])
        values = np.concatenate([best.values, new.values])
        ids = np.concatenate([best.ids, new.ids])
        order = np.lexsort((ids, -values, queries))
        sorted_queries = queries[order]
        place = np.arange(len(order)) - np.searchsorted(sorted_queries, sorted_queries)
        kept = order[place < self.k]
        parts = best.parts
        if self.parts:
            parts = np.concatenate([best.parts, new.parts], axis=1)[:, kept]
        self._best[kind] = BestPairs(queries[kept], values[kept], ids[kept], parts)

    def export_partials(self) -> Iterator[list[list[np.ndarray]]]:
        """Per kind the four arrays of its BestPairs."""
        yield [[best.queries, best.values, best.ids, best.parts] for best in self._best]

    def import_partial(self, partial: list[list[np.ndarray]]) -> None:
        self._imported.append([BestPairs(*arrays) for arrays in partial])

    def sorted_partials(self, query: int) -> Iterator[Iterator[SortablePair]]:
        for partial in (self._best, *self._imported):
            for kind, best in enumerate(partial):
                yield best.pairs(query, kind)

    def entries(self, query: int) -> Iterator[Entry]:
        return (entry for entry in super().entries(query) if entry.rank <= self.k)


class FullRanking(SortedRanking):
    """Every pair, sorted in runs in a temporary folder, and merged when read.

    Pairs of score 0 are the last proponents. With `signed` False: all pairs by falling score.
    """

    def __init__(
        self, queries: int, parts: int, run_bytes: int = RUN_BYTES, signed: bool = True
    ) -> None:
        """Raises OutputError if no temporary folder can be created."""
        super().__init__(queries, parts)
        self.signed = signed
        self._row = np.dtype(
            [("kind", "i1"), ("key", "f8"), ("id", "i8"), ("parts", "f8", (parts,))]
        )
        self._rows = max(1, run_bytes // (queries * self._row.itemsize))
        try:
            self._folder = ScratchFolder(Path(tempfile.gettempdir()))
        except OSError as error:
            raise OutputError(
                f"--top all can't create a temporary folder: {error}",
                "name a folder that can be written: TMPDIR=FOLDER",
            ) from error
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._pending_ids = 0
        self._run_sizes: list[int] = []  # rows per query of each run on disk

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        refuse_non_finite(ids, scores)
        for first in range(0, len(ids), self._rows):
            at = slice(first, first + self._rows)
            pending_parts = parts[:, :, at].copy() if self.parts and parts is not None else None
            self._pending.append((ids[at].copy(), scores[:, at].copy(), pending_parts))
            self._pending_ids += len(ids[at])
            if self._pending_ids >= self._rows:
                self._spill()

    def _spill(self) -> None:
        """Sort the pending pairs into a run."""
        if not self._pending_ids:
            return
        ids = np.concatenate([ids for ids, _, _ in self._pending])
        self._write_run((self._sort_pending(query, ids) for query in range(self.queries)), len(ids))
        self._pending, self._pending_ids = [], 0

    def _sort_pending(self, query: int, ids: np.ndarray) -> np.ndarray:
        scores = np.concatenate([scores[query] for _, scores, _ in self._pending])
        rows = np.empty(len(ids), self._row)
        rows["kind"] = (scores < 0) & self.signed
        rows["key"], rows["id"] = -np.abs(scores) if self.signed else -scores, ids
        if self.parts:
            rows["parts"] = np.concatenate(
                [parts[:, query] for _, _, parts in self._pending if parts is not None], axis=1
            ).T
        return rows[np.lexsort((rows["id"], rows["key"], rows["kind"]))]

    def _write_run(self, rows_per_query: Iterable[np.ndarray], size: int) -> None:
        """Write a run: `size` sorted rows per query."""
        try:
            spill_arrays(self._run_path(len(self._run_sizes)), rows_per_query)
        except OSError as error:
            raise OutputError(
                f"--top all can't write to {self._folder.path}: {error.strerror or error}",
                f"it needs {self._row.itemsize} bytes per pair",
                "name a folder on a larger disk: TMPDIR=FOLDER",
            ) from error
        self._run_sizes.append(size)

    def _run_path(self, run: int) -> Path:
        return self._folder.path / f"{run}"

    def export_partials(self) -> Iterator[np.ndarray]:
        """One run at a time, (Q, rows)."""
        self._spill()
        for run in range(len(self._run_sizes)):
            yield np.fromfile(self._run_path(run), self._row).reshape(self.queries, -1)

    def import_partial(self, partial: np.ndarray) -> None:
        self._write_run(partial, partial.shape[1])

    def sorted_partials(self, query: int) -> Iterator[Iterator[SortablePair]]:
        self._spill()
        return (self._read_run(run, query) for run in range(len(self._run_sizes)))

    def _read_run(self, run: int, query: int) -> Iterator[SortablePair]:
        size, step = self._run_sizes[run], max(64, READ_ROWS // len(self._run_sizes))
        # fromfile opens the file each time: there may be more runs than a process may open files
        for first in range(0, size, step):
            offset = (query * size + first) * self._row.itemsize
            count = min(step, size - first)
            rows = np.fromfile(self._run_path(run), self._row, count, offset=offset)
            parts = map(tuple, rows["parts"].tolist()) if self.parts else [()] * len(rows)
            yield from zip(
                rows["kind"].tolist(), rows["key"].tolist(), rows["id"].tolist(), parts, strict=True
            )
