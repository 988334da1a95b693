"""Streaming rankings: the top and bottom k of scores that arrive in blocks, or all of them sorted
on disk. Ties go by training id.

N examples of a block, Q queries, P parts of a score. Memory does not grow with the number of
examples.
"""

import heapq
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from influence_cli.errors import OutputError
from influence_cli.storage.scratch import spill_arrays

RUN_BYTES = 64 << 20  # scores sorted in memory at once, where all are ranked
READ_ROWS = 1 << 17  # rows of all sorted runs read at once while they are merged


class Entry(NamedTuple):
    """One ranked pair. `kind`: proponent (score >= 0) or opponent; `rank` from 1 within the query
    and kind; `parts` sum to `score`.
    """

    kind: str
    rank: int
    train: int
    score: float
    parts: tuple[float, ...] = ()


class Ranking(ABC):
    """Of `queries` queries at once. Blocks come in any order, each training id once."""

    def __init__(self, queries: int, parts: int) -> None:
        self.queries, self.parts = queries, parts

    @abstractmethod
    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        """A block: ids (N,), scores (Q, N) float64, and (P, Q, N) parts of them."""

    @abstractmethod
    def entries(self, query: int) -> Iterator[Entry]:
        """Proponents by falling score, then opponents by rising score, of the query at this
        position.
        """


class Shareable(Ranking):
    """One that several processes can add to, each apart, before their parts become one."""

    @abstractmethod
    def parcels(self) -> Iterator[Any]:
        """What is ranked so far, in pieces small beside all of it that another process can
        `take`.
        """

    @abstractmethod
    def take(self, parcel: Any) -> None:
        """A piece of another ranking, of other examples for the same queries, as if they had been
        added here.
        """


@dataclass
class _Best:
    """The k best of each query and one kind so far, by query, then falling key (falling = better),
    then id; parts (P, M) beside them.
    """

    queries: np.ndarray
    keys: np.ndarray
    ids: np.ndarray
    parts: np.ndarray


class TopRanking(Shareable):
    """The k highest scores above 0 and the k lowest below 0; with `signed` False simply the k
    highest.
    """

    def __init__(self, queries: int, parts: int, k: int, signed: bool = True) -> None:
        super().__init__(queries, parts)
        self.k, self.signed = k, signed
        empty = np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64), np.empty((parts, 0))
        self._best = [_Best(*empty) for _ in range(2 if signed else 1)]

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        for kind, sign in enumerate((1, -1)[: len(self._best)]):
            bars = self._bars(kind, sign, scores)[:, None]
            good = np.flatnonzero(
                scores >= bars if sign > 0 else scores <= -bars
            )  # equal: may still win by its id
            query, at = np.divmod(good, scores.shape[1])
            if len(at):
                self._merge(
                    kind,
                    _Best(
                        query,
                        sign * scores[query, at],
                        ids[at],
                        parts[:, query, at] if parts is not None else no_parts(at),
                    ),
                )

    def parcels(self) -> Iterator[list[_Best]]:
        yield self._best

    def take(self, parcel: list[_Best]) -> None:
        for kind, best in enumerate(parcel):
            self._merge(kind, best)

    def _bars(self, kind: int, sign: int, scores: np.ndarray) -> np.ndarray:
        """(Q,): a key below its query's is not among the k best of those kept nor, where fewer are
        kept, of this block. Never sorts.
        """
        best, least = self._best[kind], max(0, scores.shape[1] - self.k)
        bars = np.full(self.queries, -np.inf)
        full = np.flatnonzero(np.bincount(best.queries, minlength=self.queries) == self.k)
        bars[full] = best.keys[np.searchsorted(best.queries, full, side="right") - 1]
        open = np.flatnonzero(np.isneginf(bars))
        if len(open):
            bars[open] = np.partition(sign * scores[open], least, axis=1)[:, least]
        return np.maximum(bars, np.nextafter(0, 1)) if self.signed else bars

    def _merge(self, kind: int, new: _Best) -> None:
        best = self._best[kind]
        query, keys, ids = (
            np.concatenate(pair)
            for pair in ((best.queries, new.queries), (best.keys, new.keys), (best.ids, new.ids))
        )
        order = np.lexsort((ids, -keys, query))
        sorted_ = query[order]
        kept = order[np.arange(len(order)) - np.searchsorted(sorted_, sorted_) < self.k]
        parts = (
            np.concatenate([best.parts, new.parts], axis=1)[:, kept] if self.parts else best.parts
        )
        self._best[kind] = _Best(query[kept], keys[kept], ids[kept], parts)

    def entries(self, query: int) -> Iterator[Entry]:
        for kind, sign, best in zip(("proponent", "opponent"), (1, -1), self._best, strict=False):
            first, last = np.searchsorted(best.queries, [query, query + 1])
            for rank, at in enumerate(range(first, last), start=1):
                score = float(sign * best.keys[at])
                yield Entry(
                    kind,
                    rank,
                    int(best.ids[at]),
                    score,
                    tuple(best.parts[:, at].tolist()) if self.parts else (),
                )


def no_parts(at: np.ndarray) -> np.ndarray:
    return np.empty((0, len(at)))


class FullRanking(Shareable):
    """Every pair: spilled to a temporary folder in sorted runs, merged when read. Zeros are the
    last proponents.
    """

    def __init__(self, queries: int, parts: int, run_bytes: int = RUN_BYTES) -> None:
        super().__init__(queries, parts)
        self._row = np.dtype(
            [("kind", "i1"), ("key", "f8"), ("id", "i8"), ("parts", "f8", (parts,))]
        )
        self._rows = max(1, run_bytes // (queries * self._row.itemsize))
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="influence-ranking-")
        except OSError as error:
            raise OutputError(
                f"--top all has no place to spill to: {error}",
                "TMPDIR names a folder that can be written",
            ) from error
        self._pending: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]] = []
        self._waiting, self._runs = 0, 0
        self._sizes: list[int] = []

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        for first in range(0, len(ids), self._rows):
            at = slice(first, first + self._rows)
            self._pending.append(
                (
                    ids[at].copy(),
                    scores[:, at].copy(),
                    parts[:, :, at].copy() if self.parts and parts is not None else None,
                )
            )
            self._waiting += len(ids[at])
            if self._waiting >= self._rows:
                self._spill()

    def _spill(self) -> None:
        """Sort what waits, per query, into a run: one file with Q sorted stretches."""
        if not self._waiting:
            return
        ids = np.concatenate([ids for ids, _, _ in self._pending])

        def stretches() -> Iterator[np.ndarray]:
            for query in range(self.queries):
                scores = np.concatenate([scores[query] for _, scores, _ in self._pending])
                rows = np.empty(len(ids), self._row)
                rows["kind"], rows["key"], rows["id"] = scores < 0, -np.abs(scores), ids
                if self.parts:
                    rows["parts"] = np.concatenate(
                        [parts[:, query] for _, _, parts in self._pending if parts is not None],
                        axis=1,
                    ).T
                yield rows[np.lexsort((rows["id"], rows["key"], rows["kind"]))]

        self._write(stretches(), len(ids))
        self._pending, self._waiting = [], 0

    def _write(self, stretches: Iterable[np.ndarray], size: int) -> None:
        """A run: a sorted stretch of `size` rows per query."""
        try:
            spill_arrays(Path(self._folder.name) / f"{self._runs}", stretches)
        except OSError as error:
            raise OutputError(
                f"--top all could not be spilled to {self._folder.name}: {error.strerror or error}",
                f"it needs {self._row.itemsize} bytes a pair",
                "TMPDIR names a folder on a larger disk",
            ) from error
        self._sizes.append(size)
        self._runs += 1

    def parcels(self) -> Iterator[np.ndarray]:
        """One run at a time, (Q, rows)."""
        self._spill()
        for run in range(self._runs):
            yield np.fromfile(Path(self._folder.name) / f"{run}", self._row).reshape(
                self.queries, -1
            )

    def take(self, parcel: np.ndarray) -> None:
        self._write(parcel, parcel.shape[1])

    def _run(self, run: int, query: int) -> Iterator[tuple[int, float, int, tuple[float, ...]]]:
        size, step = self._sizes[run], max(64, READ_ROWS // self._runs)
        for first in range(
            0, size, step
        ):  # opened anew each time: there may be more runs than a process may have open files
            offset = (query * size + first) * self._row.itemsize
            rows = np.fromfile(
                Path(self._folder.name) / f"{run}",
                self._row,
                min(step, size - first),
                offset=offset,
            )
            parts = map(tuple, rows["parts"].tolist()) if self.parts else [()] * len(rows)
            yield from zip(
                rows["kind"].tolist(), rows["key"].tolist(), rows["id"].tolist(), parts, strict=True
            )

    def entries(self, query: int) -> Iterator[Entry]:
        self._spill()
        rank, last = 0, -1
        for kind, key, id, parts in heapq.merge(
            *(self._run(run, query) for run in range(self._runs))
        ):
            rank = rank + 1 if kind == last else 1
            last = kind
            yield Entry("opponent" if kind else "proponent", rank, id, key if kind else -key, parts)
