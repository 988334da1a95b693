"""Selects example ids: the blocks of a fixed grid, and evenly spaced samples.

Units and scores depend only on the request, because the grid is fixed.
"""

from collections.abc import Iterator

import numpy as np

Ids = range | np.ndarray  # rising example ids


def cut_by_grid(ids: Ids, size: int) -> Iterator[np.ndarray]:
    """The ids, one array per block of a fixed grid: 0..size, size..2 size, ..."""
    if not len(ids):
        return
    for start in range(int(ids[0]) // size * size, int(ids[-1]) + 1, size):
        block = select_range(ids, start, start + size)
        if len(block):
            yield block


def cut_ids(ids: Ids, size: int) -> Iterator[np.ndarray]:
    """The ids by blocks of the grid. Joins neighbouring blocks of scattered ids, up to `size` ids
    together."""
    if isinstance(ids, range) or not len(ids):
        yield from cut_by_grid(ids, size)
        return
    ends = [*(np.flatnonzero(np.diff(ids // size)) + 1), len(ids)]  # of the grid's blocks
    first = 0
    for end, following in zip(ends, [*ends[1:], np.inf], strict=True):
        if following - first > size:
            yield ids[first:end]
            first = end


def select_range(ids: Ids, start: int, stop: int) -> np.ndarray:
    """The ids from start to stop, exclusive."""
    if isinstance(ids, range):
        return np.arange(max(start, ids.start), min(stop, ids.stop))
    return ids[np.searchsorted(ids, start) : np.searchsorted(ids, stop)]


def spread_evenly(count: int, most: int) -> list[int]:
    """At most `most` of the positions 0 to `count` - 1, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()
