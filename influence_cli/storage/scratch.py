"""Temporary data that is too large for memory. Its folder is deleted when the command ends.

Nobody reads it after a crash, so it needs no sync and no rename.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np


def spill_arrays(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Writes arrays one after the other, as raw numbers."""
    with path.open("wb") as file:
        for array in arrays:
            array.tofile(file)


def map_zeros(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped float64 array of zeros in a new file. Raises OSError where it has no room."""
    path.unlink(missing_ok=True)
    return np.memmap(path, dtype=np.float64, mode="w+", shape=shape)
