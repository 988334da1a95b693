"""The distribution of the scores of a table, as bars."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 41
SIZE = (600, 120)  # of the picture


@dataclass(frozen=True)
class Bar:
    """One bin, in units of the picture. `sign`: of its scores; 0 for a bin around 0."""

    x: float
    y: float
    width: float
    height: float
    sign: int
    title: str


@dataclass(frozen=True)
class Distribution:
    """Of the scores of a table. `marks`: (name, value) of quantiles. `zero`: where 0 is."""

    count: int
    positive: int
    bars: list[Bar]
    marks: list[tuple[str, float]]
    zero: float | None


def describe_distribution(scores: Sequence[float]) -> Distribution | None:
    """None without scores. An empty bin has no bar; any other has at least two units."""
    if not scores:
        return None
    values = np.asarray(scores, np.float64)
    low, high = float(values.min()), float(values.max())
    largest = max(abs(low), abs(high)) or 1.0
    scaled = values / largest  # between -1 and 1: no width overflows
    edges = find_edges(low / largest, high / largest)
    counts, edges = np.histogram(scaled, edges)
    (width, height), number = SIZE, len(counts)
    bars = [
        Bar(
            at * width / number,
            height - (size := max(2.0, count / counts.max() * (height - 4))),
            width / number - 1,
            size,
            0 if left < 0 < right else 1 if left >= 0 else -1,
            f"{format_score(left * largest)} to {format_score(right * largest)}: {count:,}",
        )
        for at, (count, left, right) in enumerate(zip(counts, edges[:-1], edges[1:], strict=True))
        if count
    ]
    quantiles = (0, 0.05, 0.5, 0.95, 1)
    names = ("lowest", "5 %", "median", "95 %", "highest")
    marks = list(zip(names, np.quantile(values, quantiles).tolist(), strict=True))
    zero = -edges[0] / (edges[-1] - edges[0]) * width
    return Distribution(
        len(values),
        int((values > 0).sum()),
        bars,
        marks,
        zero if 0 < zero < width else None,
    )


def find_edges(low: float, high: float) -> np.ndarray:
    """Edges of bins of equal width. If scores have both signs, 0 is an edge."""
    if low == high:
        return np.array([low - 0.5, high + 0.5])
    if low >= 0 or high <= 0:
        return np.linspace(low, high, BINS + 1)
    width = (high - low) / BINS
    below, above = int(np.ceil(-low / width)), int(np.ceil(high / width))
    return np.arange(-below, above + 1) * width


def format_score(value: float) -> str:
    """Three digits: `-172`, `0.0123`, `1.2e-07`; a minus sign as typesetters write it."""
    return f"{value:,.3g}".replace("-", "\u2212", 1) if abs(value) < 1000 else f"{value:,.0f}"
