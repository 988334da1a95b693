"""Example ids as Python values: a number, a list, a range or an array."""

from collections.abc import Sequence

import numpy as np

from influence_cli.api.specs import as_range, out_of_range
from influence_cli.errors import UsageProblem, shown

# text: as on the command line, such as "0,5,10:20" or "@ids.txt"
IdSelection = str | int | Sequence[int] | np.ndarray | None

EXPECTED = "expected: an id, a list, a range or an array of ids, or a text such as '0,5,10:20'"


def read_ids(
    flag: str, selection: int | Sequence[int] | np.ndarray, size: int, source: str
) -> range | np.ndarray:
    """Rising distinct ids of a dataset of `size`; a range where they are one. `source`: what
    messages call the dataset.

    Raises UsageProblem: no ids, out of range, something else than integers.
    """
    if isinstance(selection, range) and selection.step == 1 and len(selection):
        ids = np.array([selection[0], selection[-1]])
    else:
        try:
            ids = np.atleast_1d(np.asarray(selection))
        except (ValueError, TypeError):  # a ragged list
            ids = np.array([None])
    if not ids.size:
        raise UsageProblem(f"{flag}: {shown(selection)} has no ids", EXPECTED)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageProblem(f"{flag}: {shown(selection)} is no list of ids", EXPECTED)
    for index in (ids.min(), ids.max()):
        if not 0 <= index < size:
            raise out_of_range(flag, str(index), size, source)
    if isinstance(selection, range) and selection.step == 1:
        return selection
    return as_range(np.unique(ids.astype(np.int64)))
