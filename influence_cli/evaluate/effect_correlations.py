"""Compares predicted effects with measured ones: correlations per query, their mean, and pooled.

Shape letters: R measurements (removals, subsets), Q queries.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from influence_cli.evaluate.correlation import interval, pearson, spearman
from influence_cli.evaluate.declaration import TRAINING, Figure
from influence_cli.progress import Reporter

Correlate = Callable[[np.ndarray, np.ndarray], float]
CORRELATIONS: dict[str, Correlate] = {"spearman": spearman, "pearson": pearson}


@dataclass(frozen=True)
class FigureMaker:
    """Makes the figures of one protocol. `queries`: ids. `cost`: of its measurements."""

    queries: Sequence[int | str]
    cost: str
    seed: int

    def mean(
        self, method: str, name: str, values_Q: np.ndarray, count: int | np.ndarray
    ) -> Iterator[Figure]:
        """One figure per query, then their mean with its 95 % interval (bootstrap over queries).

        `count`: how many numbers the value of a query was computed from; one, or (Q,). The mean is
        over the queries that have a value.
        """
        counts_Q = np.broadcast_to(count, len(values_Q))
        columns = self.queries, values_Q.tolist(), counts_Q.tolist()
        for query, value, size in zip(*columns, strict=True):
            number = None if np.isnan(value) else value
            yield Figure(method, name, number, None, None, size, self.cost, str(query))
        known = values_Q[~np.isnan(values_Q)]
        if not len(known):
            yield Figure(method, name, None, None, None, 0, self.cost)
            return
        low, high = interval(known, self.seed)
        yield Figure(method, name, float(known.mean()), low, high, len(known), self.cost)

    def correlations(
        self, method: str, predicted_RQ: np.ndarray, measured_RQ: np.ndarray, reporter: Reporter
    ) -> Iterator[Figure]:
        """Spearman and Pearson of each query, and their means."""
        values = {
            name: correlate_queries(correlate, predicted_RQ, measured_RQ)
            for name, correlate in CORRELATIONS.items()
        }
        missing = int(np.isnan(list(values.values())).any(axis=0).sum())
        if missing:
            reporter.note(
                f"{method}: {missing} of {len(self.queries)} queries have no correlation, because "
                "the scores or the effects of all of them are equal. The means are over the other "
                "queries"
            )
        for name, values_Q in values.items():
            yield from self.mean(method, name, values_Q, len(measured_RQ))

    def pooled(
        self, method: str, predicted_RQ: np.ndarray, measured_RQ: np.ndarray
    ) -> Iterator[Figure]:
        """Spearman and Pearson of all pairs at once."""
        for name, correlate in CORRELATIONS.items():
            value = correlate(predicted_RQ.ravel(), measured_RQ.ravel())
            number = None if np.isnan(value) else value
            yield Figure(method, f"pooled-{name}", number, None, None, predicted_RQ.size, self.cost)

    def sizes(self, effects_RQ: np.ndarray, noise_Q: np.ndarray) -> Iterator[Figure]:
        """The standard deviation of the measured effects, and their noise."""
        spread_Q = spread(effects_RQ, axis=0)
        yield from self.mean(TRAINING, "effect", spread_Q, len(effects_RQ))
        yield from self.mean(TRAINING, "noise", noise_Q, 2)


def correlate_queries(
    correlate: Correlate, predicted_RQ: np.ndarray, measured_RQ: np.ndarray
) -> np.ndarray:
    """(Q,) the correlation of each query; nan where one of the two does not vary."""
    columns = zip(predicted_RQ.T, measured_RQ.T, strict=True)
    return np.array([correlate(predicted, measured) for predicted, measured in columns])


def spread(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation, whose squares neither overflow nor underflow."""
    largest = np.abs(values).max() or 1.0
    return (values / largest).std(axis=axis) * largest


def root_mean_square(values: np.ndarray) -> float:
    largest = np.abs(values).max() or 1.0
    return float(np.sqrt(np.square(values / largest).mean()) * largest)
