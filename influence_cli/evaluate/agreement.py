"""Compares predicted effects with measured ones: correlations per query, their mean, and pooled.

Shape letters: R removals, Q queries.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from influence_cli.evaluate.correlation import interval, pearson, spearman
from influence_cli.evaluate.declaration import EvaluationRequest, Row
from influence_cli.extraction.source import GradientSource
from influence_cli.progress import Reporter


def agreement_rows(
    source: GradientSource,
    request: EvaluationRequest,
    predicted: Mapping[str, np.ndarray],
    effects_RQ: np.ndarray,
    noise_Q: np.ndarray,
) -> Iterator[Row]:
    """The table. `predicted`: (R, Q) of each method. `effects_RQ`: measured.

    A `mean` row is the mean of the rows above it. A `pooled` row correlates all pairs at once; its
    noise is the root mean square.
    """
    queries, count = [int(query) for query in request.queries], len(effects_RQ)
    spread_Q = spread(effects_RQ, axis=0)
    for method, predicted_RQ in predicted.items():
        columns = zip(predicted_RQ.T, effects_RQ.T, strict=True)
        pairs_Q2 = np.array([correlate(a, b) for a, b in columns])
        means = mean_correlations(source.reporter, method, pairs_Q2, request.seed)
        for query, pair, effect, noise in zip(queries, pairs_Q2, spread_Q, noise_Q, strict=True):
            label = source.run.query.label(query)
            yield (method, str(query), *cells(pair), count, float(effect), float(noise), label)
        effect, noise = float(spread_Q.mean()), float(noise_Q.mean())
        yield (method, "mean", *cells(means), count, effect, noise, "")
        pair = correlate(predicted_RQ.ravel(), effects_RQ.ravel())
        effect, noise = float(spread(effects_RQ)), root_mean_square(noise_Q)
        yield (method, "pooled", *cells(pair), count, effect, noise, "")


def correlate(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Spearman, Pearson."""
    return spearman(predicted, measured), pearson(predicted, measured)


def mean_correlations(
    reporter: Reporter, method: str, pairs_Q2: np.ndarray, seed: int
) -> np.ndarray:
    """(2,) means over the queries that have correlations; a note gives their intervals."""
    known_Q2 = pairs_Q2[~np.isnan(pairs_Q2).any(axis=1)]
    if len(known_Q2) < len(pairs_Q2):
        reporter.note(
            f"{method}: {len(pairs_Q2) - len(known_Q2)} of {len(pairs_Q2)} queries have no "
            "correlation, because the scores or the effects of all removals are equal. The means "
            "are over the other queries"
        )
    if not len(known_Q2):
        return np.full(2, np.nan)
    means = known_Q2.mean(axis=0)
    texts = []
    for name, mean, values in zip(("Spearman", "Pearson"), means, known_Q2.T, strict=True):
        low, high = interval(values, seed)
        texts.append(f"{name} {mean:.3f} [{low:.3f}, {high:.3f}]")
    reporter.note(
        f"{method}: {', '.join(texts)}: mean over {len(known_Q2)} queries and its 95 % "
        "interval (bootstrap over queries)"
    )
    return means


def cells(correlations: Iterable[float]) -> list[float | None]:
    """None, an empty cell, for nan."""
    return [None if np.isnan(value) else float(value) for value in correlations]


def spread(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The standard deviation, whose squares neither overflow nor underflow."""
    largest = np.abs(values).max() or 1.0
    return (values / largest).std(axis=axis) * largest


def root_mean_square(values: np.ndarray) -> float:
    largest = np.abs(values).max() or 1.0
    return float(np.sqrt(np.square(values / largest).mean()) * largest)
