"""Reads rows from the cache, and computes those that it lacks: one pass over the data.

A computed unit goes to the writer, and to the reader in the form in which it is stored. So a first
run, a resumed one and a later one return the same bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.store import UnitWriter
from influence_cli.cache.unit_file import Level
from influence_cli.extraction.cached_rows import CachedRows
from influence_cli.extraction.fill import CacheFiller, FillRequest
from influence_cli.run.checkpoints import Checkpoint

Block = tuple[Checkpoint, np.ndarray]  # the examples of at most one unit
LoadRows = Callable[[], GradientRows]
Key = TypeVar("Key")


def read_blocks(
    rows: CachedRows, split: str, blocks: Iterable[Block], columns: Sequence[str], level: Level
) -> Iterator[tuple[Checkpoint, GradientRows]]:
    """The rows of each block, all of them in the cache. It prefetches the next block."""
    with ThreadPoolExecutor(1) as thread:
        yield from one_ahead(
            (checkpoint, fetch(thread, rows, split, checkpoint, columns, level, ids))
            for checkpoint, ids in blocks
        )


def read_or_compute(
    filler: CacheFiller,
    split: str,
    blocks: Iterable[Block],
    columns: Sequence[str],
    disk_bytes: int,
) -> Iterator[tuple[Checkpoint, GradientRows]]:
    """The same, where the cache may lack rows. `disk_bytes`: of the rows that it lacks.

    A kill costs the unit that is computed and the one that is written. Read it to its end: that
    waits for the last unit on disk.
    """
    rows = filler.rows

    def loads() -> Iterator[tuple[Checkpoint, LoadRows]]:
        for checkpoint, ids in blocks:
            request = FillRequest(split, [(checkpoint, ids)], columns)
            if len(filler.plan(request)):
                yield checkpoint, partial(compute, filler, request, writer)
            else:
                yield (
                    checkpoint,
                    fetch(thread, rows, split, checkpoint, columns, "values", ids),
                )

    with (
        ThreadPoolExecutor(1) as thread,
        rows.store.writer(rows.settings.storage_dtype, disk_bytes) as writer,
    ):
        yield from one_ahead(loads())
    rows.forget_indexes()


def compute(filler: CacheFiller, request: FillRequest, writer: UnitWriter) -> GradientRows:
    """The rows of one block. Those that the cache lacks are computed and written."""
    ((checkpoint, ids),) = request.ids_at
    plan = filler.plan(request)
    decoded = None
    for work in plan:
        if (computed := filler.compute(request, work)) is not None:
            decoded = writer.write_and_decode(work.unit, computed)
    is_whole = len(plan) == 1 and list(plan[0].unit.columns) == list(request.columns)
    if decoded is not None and is_whole and np.array_equal(decoded.ids, ids):
        return decoded
    writer.finish()  # the cache has some of the rows already
    filler.rows.forget_indexes()
    index = filler.rows.index(request.split, checkpoint)
    return index.read_rows(request.columns, request.level, np.asarray(ids))


def fetch(
    thread: ThreadPoolExecutor,
    rows: CachedRows,
    split: str,
    checkpoint: Checkpoint,
    columns: Sequence[str],
    level: Level,
    ids: np.ndarray,
) -> LoadRows:
    """Begin to read in the thread; the result waits for it, and decodes."""
    index = rows.index(split, checkpoint)
    reading = thread.submit(index.fetch_rows, columns, level, ids)
    return lambda: reading.result()()


def one_ahead(loads: Iterator[tuple[Key, LoadRows]]) -> Iterator[tuple[Key, GradientRows]]:
    """The results, each after the next load was begun."""
    pending: tuple[Key, LoadRows] | None = None
    for following in loads:
        if pending is not None:
            yield pending[0], pending[1]()
        pending = following
    if pending is not None:
        yield pending[0], pending[1]()
