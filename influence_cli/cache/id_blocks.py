"""How example ids are cut into the blocks of a fixed grid, so that units and scores follow from the request alone."""

from collections.abc import Iterator

import numpy as np

Ids = range | np.ndarray  # rising example ids


def blocks(ids: Ids, size: int) -> Iterator[np.ndarray]:
    """The ids by the blocks of a fixed grid (0..size, size..2 size, ...) that they fall into."""
    if not len(ids):
        return
    for start in range(int(ids[0]) // size * size, int(ids[-1]) + 1, size):
        block = within(ids, start, start + size)
        if len(block):
            yield block


def cut(ids: Ids, size: int) -> Iterator[np.ndarray]:
    """The ids by blocks of the grid; scattered ones by several neighbouring blocks together, as many as hold at most `size` of them."""
    if isinstance(ids, range) or len(ids) <= 1:
        yield from blocks(ids, size)
        return
    ends = [*(np.flatnonzero(np.diff(ids // size)) + 1), len(ids)]  # of the grid's blocks
    first = 0
    for end, following in zip(ends, [*ends[1:], np.inf], strict=True):
        if following - first > size:
            yield ids[first:end]
            first = end


def within(ids: Ids, start: int, stop: int) -> np.ndarray:
    """Those of the rising ids that lie in start..stop."""
    if isinstance(ids, range):
        return np.arange(max(start, ids.start), min(stop, ids.stop))
    return ids[np.searchsorted(ids, start) : np.searchsorted(ids, stop)]
