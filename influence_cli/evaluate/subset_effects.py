"""Trains on random subsets, and compares each query's m with the scores (Park et al. 2023,
arXiv:2303.14186, section 2).

predicted[r, q] = - sum over the examples of subset r of score(example, q)
measured[r, q]  = m(theta of a training on subset r, q)

A score above 0 says that the example lowers m; so the two rise together for a perfect method.

Shape letters: R subsets, N training examples, S seeds, Q queries.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from influence_cli.errors import UsageProblem
from influence_cli.evaluate.correlation import spearman
from influence_cli.evaluate.declaration import (
    TRAINING,
    EvaluationRequest,
    Figure,
    describe_cost,
)
from influence_cli.evaluate.effect_correlations import FigureMaker, correlate_queries
from influence_cli.evaluate.lds import LdsOptions
from influence_cli.evaluate.result_log import total_seconds
from influence_cli.evaluate.retraining import noise_of, note_noise
from influence_cli.evaluate.score_files import read_score_matrix
from influence_cli.evaluate.subset_training import SubsetTrainings, values_of
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import Entry, Ranking, refuse_non_finite


def evaluate(source: GradientSource, request: EvaluationRequest) -> Iterator[Figure]:
    """Correlations of each method's predictions with the measurements, per query and their mean
    over queries; then the size of the effects, their noise, and with several seeds the Spearman
    correlation between trainings that differ in their seed alone.
    """
    options = request.options
    assert isinstance(options, LdsOptions)
    count = len(source.run.train)
    members_RN = draw_subsets(count, options.subsets, options.fraction, request.seed)
    trainings = SubsetTrainings(source, request, "lds", options.renormalize, options.retrainings)
    predicted = {
        name: predict_subsets(source, METHODS[name], score_request, members_RN)
        for name, score_request in request.requests.items()
    }
    for file in request.score_files:
        scores_QN = read_score_matrix(file, request.queries, count)
        predicted[str(file)] = -(members_RN.astype(np.float64) @ scores_QN.T)
    records = trainings.measure([np.flatnonzero(~members_N) for members_N in members_RN], "subset")
    values_RSQ = values_of(records, options.retrainings)
    measured_RQ, noise_Q = values_RSQ.mean(axis=1), noise_of(trainings.baseline)
    note_noise(source.reporter, measured_RQ - measured_RQ.mean(axis=0), noise_Q)
    cost = describe_cost(2 + len(records), total_seconds([trainings.baseline, *records]))
    figures = FigureMaker(list(request.queries), cost, request.seed)
    for name, predicted_RQ in predicted.items():
        yield from figures.correlations(name, predicted_RQ, measured_RQ, source.reporter)
    yield from figures.sizes(measured_RQ, noise_Q)
    if options.retrainings > 1:
        agreement_Q = correlate_seeds(values_RSQ)
        yield from figures.mean(TRAINING, "seeds-spearman", agreement_Q, len(measured_RQ))


def draw_subsets(count: int, subsets: int, fraction: float, seed: int) -> np.ndarray:
    """(R, N) bool: which examples each random subset keeps. More subsets keep the first ones.

    Raises UsageProblem for a fraction that keeps no example, or all.
    """
    size = round(fraction * count) if 0 < fraction < 1 else 0
    if not 0 < size < count:
        raise UsageProblem(
            f"--fraction {fraction:g} keeps {'no' if fraction < 0.5 else 'each'} one of the "
            f"{count:,} training examples",
            "expected: a share between 0 and 1 that leaves out some of them, such as 0.5",
        )
    members_RN = np.zeros((subsets, count), bool)
    for number, members_N in enumerate(members_RN):
        random = np.random.default_rng([seed, number])
        members_N[random.permutation(count)[:size]] = True
    return members_RN


class SubsetSums(Ranking):
    """Keeps no scores, only their sums over each subset: `sums_RQ`."""

    def __init__(self, queries: int, parts: int, members_RN: np.ndarray) -> None:
        super().__init__(queries, parts)
        self.members_RN = members_RN
        self.sums_RQ = np.zeros((len(members_RN), queries))

    def add(self, ids: np.ndarray, scores: np.ndarray, parts: np.ndarray | None = None) -> None:
        refuse_non_finite(ids, scores)
        self.sums_RQ += self.members_RN[:, ids].astype(np.float64) @ scores.T

    def entries(self, query: int) -> Iterator[Entry]:
        """None: it ranks nothing."""
        return iter(())


def predict_subsets(
    source: GradientSource, method: Method, request: ScoreRequest, members_RN: np.ndarray
) -> np.ndarray:
    """(R, Q) minus the sum of the scores of each subset."""
    request = dataclasses.replace(request, train=range(members_RN.shape[1]))
    results = method.score(source, request, partial(SubsetSums, members_RN=members_RN))
    return -np.concatenate([sums_of(scored.ranking) for scored in results], axis=1)


def sums_of(ranking: object) -> np.ndarray:
    assert isinstance(ranking, SubsetSums)
    return ranking.sums_RQ


def correlate_seeds(values_RSQ: np.ndarray) -> np.ndarray:
    """(Q,) mean Spearman between the measurements of two seeds, over all pairs of seeds."""
    pairs: Sequence[np.ndarray] = [
        correlate_queries(spearman, values_RSQ[:, one], values_RSQ[:, other])
        for one, other in itertools.combinations(range(values_RSQ.shape[1]), 2)
    ]
    return np.mean(pairs, axis=0)
