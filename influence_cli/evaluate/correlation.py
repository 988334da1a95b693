"""Rank and linear correlation, and a bootstrap interval for their mean."""

import numpy as np

RESAMPLES = 2000  # of the bootstrap


def ranks(values: np.ndarray) -> np.ndarray:
    """(N,) ranks from 1; equal values share their mean rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]


def pearson(a: np.ndarray, b: np.ndarray) -> float:
    """Linear correlation; nan if one of the two does not vary."""
    if a.min() == a.max() or b.min() == b.max():
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # squares of tiny effects would underflow
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation."""
    return pearson(ranks(a), ranks(b))


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean of the values."""
    random = np.random.default_rng(seed)
    means = [random.choice(values, len(values)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
