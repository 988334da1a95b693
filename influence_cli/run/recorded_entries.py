"""Checks the numbers that a training loop gives the recorder: indices, weights, clip, rates.

They come as lists, arrays or tensors. This code runs at every training step, so valid input takes
the shortest path and errors are raised at the end.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from influence_cli.errors import TrajectoryError

Numbers = Sequence[Any] | np.ndarray | Tensor  # Any: numbers of Python, numpy or torch


def read_entries(indices: Numbers, weights: Numbers | None) -> tuple[list[int], list[float] | None]:
    """The ids and the weights of a micro-batch's entries."""
    ids = read_integers("indices", indices)
    if ids and min(ids) < 0:
        raise TrajectoryError(
            f"indices: {min(ids)} is no example id", "expected: indices of train_data(), from 0"
        )
    if weights is None:
        return ids, None
    try:
        values = list(map(float, to_list(weights)))
        if len(values) == len(ids) and math.isfinite(sum(values)) and min(values, default=0) >= 0:
            return ids, values
    except (TypeError, ValueError, OverflowError):
        pass
    raise TrajectoryError(
        "weights do not fit indices",
        f"expected: {len(ids)} finite numbers from 0, one per entry",
        f"found: {weights!r:.80}",
    )


def read_integers(name: str, values: Numbers) -> list[int]:
    try:
        numbers = to_list(values)
        if {int}.issuperset(map(type, numbers)):
            return numbers
        if not any("bool" in str(getattr(value, "dtype", type(value))) for value in numbers):
            return list(map(operator.index, numbers))
    except TypeError:
        pass
    raise TrajectoryError(
        f"{name}: not whole numbers",
        "expected: a list, array or tensor of one axis",
        f"found: {values!r:.80}",
    )


def read_number(name: str, value: Any) -> float:  # Any: a number of Python, numpy or torch
    try:
        if 0 <= (number := float(value)) < math.inf:
            return number
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise TrajectoryError(f"{name} is {value!r:.80}", "expected: a finite number from 0")


def to_list(values: Numbers) -> list[Any]:  # Any: as in Numbers
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    numbers = values if isinstance(values, list) else list(values)
    if not isinstance(numbers, list):
        raise TypeError("one number, not a list")
    return numbers
