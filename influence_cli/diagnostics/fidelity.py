"""Measures how scores from projected or narrowly stored gradients differ from exact ones.

It computes the scores of a sample of the run's own pairs three times: from exact gradients, from
projected ones, and from what the cache would return. The score here is the inner product of two
gradients, summed over parameters and over the sampled checkpoints.

Shape letters: N train, Q query, C columns (parameters).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.cache.quantize import STORE_EPS, as_stored
from influence_cli.diagnostics.finding import CHECKPOINTS, Finding
from influence_cli.evaluate.correlation import pearson, spearman
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.gradients.projection import Projection
from influence_cli.run.checkpoints import Checkpoint

TRAIN, QUERIES, TOP = 200, 20, 10  # sampled training examples and queries; highest scores compared
QUERY_BYTES = 1 << 30  # exact gradients of the sampled queries in memory; at least two queries
STEP = 16  # training examples whose exact gradients are in memory
# the K that a search tries; the second group if the first does not reach the target
LADDERS = ((16, 32, 64, 128, 256, 512), (1024, 2048, 4096, 8192))
SQUARE_LADDERS = ((16, 64, 256, 1024), (4096, 16384))  # kronecker needs squares

KeepForm = Callable[[str, Form], Form]  # (column, exact gradients) -> the gradients that are kept


@dataclass(frozen=True)
class Fidelity:
    """How scores S' from kept gradients differ from exact scores S.

    `error`: |S' - S| / |S| over all pairs. `allowed`: the error that theory allows. The other
    figures are means over the queries; nan if no query's scores vary.
    """

    kept: str
    error: float
    allowed: float
    pearson: float
    spearman: float
    overlap: float  # share of the ten highest scores
    pairs: tuple[int, int]
    numbers: int  # per example, as dense gradients

    @property
    def reached(self) -> float:
        """The smaller of the two correlations; 0 if the scores do not vary."""
        return min(0.0 if math.isnan(value) else value for value in (self.pearson, self.spearman))

    def __str__(self) -> str:
        queries, train = self.pairs
        return (
            f"Pearson {self.pearson:.4f}, Spearman {self.spearman:.4f}, top-{min(TOP, train)} "
            f"overlap {self.overlap:.2f} "
            f"({queries} queries x {train} examples)"
        )


@dataclass(frozen=True)
class Sample:
    """The sampled pairs of a run."""

    gradients: GradientSource  # exact, of the same run
    checkpoints: tuple[Checkpoint, ...]
    columns: tuple[str, ...]
    train: np.ndarray
    queries: np.ndarray

    @classmethod
    def draw(
        cls,
        gradients: GradientSource,
        checkpoints: Sequence[Checkpoint],
        columns: Sequence[str],
        ids: Mapping[str, Ids],
    ) -> "Sample":
        """Evenly spread training examples, queries and checkpoints."""
        itemsize = max(4, gradients.settings.precision.itemsize)
        query_bytes = sum(gradients.run.columns[name].numel for name in columns) * itemsize
        most_queries = max(2, min(QUERIES, QUERY_BYTES // query_bytes))

        def sample_ids(split: str, most: int) -> np.ndarray:
            return np.array([ids[split][i] for i in spread_evenly(len(ids[split]), most)])

        return cls(
            gradients.exact(),
            tuple(checkpoints[i] for i in spread_evenly(len(checkpoints), CHECKPOINTS)),
            tuple(columns),
            sample_ids("train", TRAIN),
            sample_ids("query", most_queries),
        )

    def compute_scores(
        self, keeps: Mapping[str, KeepForm]
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The (Q, N) float64 scores of each way to keep gradients; and (C, Q, N) products of norms,
        summed over checkpoints.
        """
        scores = {key: np.zeros((len(self.queries), len(self.train))) for key in keeps}
        norms_CQN = np.zeros((len(self.columns), len(self.queries), len(self.train)))
        total = len(self.checkpoints) * len(self.train)
        with self.gradients.reporter.progress("exact gradients to compare with", total) as advance:
            for checkpoint in self.checkpoints:
                queries = concat_rows(list(self.read("query", checkpoint, self.queries)))
                kept = {
                    key: {
                        name: keep(name, queries.forms[name]).as_queries() for name in self.columns
                    }
                    for key, keep in keeps.items()
                }
                for first in range(0, len(self.train), STEP):
                    at = slice(first, first + STEP)
                    rows = concat_rows(list(self.read("train", checkpoint, self.train[at])))
                    for key, keep in keeps.items():
                        for name in self.columns:
                            products_NQ = keep(name, rows.forms[name]).dot(kept[key][name])
                            scores[key][:, at] += products_NQ.double().T.numpy()
                    for number, name in enumerate(self.columns):
                        squares_QN = np.outer(queries.sqnorms[name], rows.sqnorms[name])
                        norms_CQN[number, :, at] += np.sqrt(squares_QN)
                    advance(len(rows.ids))
        return scores, norms_CQN

    def read(self, split: str, checkpoint: Checkpoint, ids: np.ndarray) -> Iterator[GradientRows]:
        for first in range(0, len(ids), STEP):
            yield from self.gradients.read(
                split, checkpoint, self.columns, ids[first : first + STEP]
            )

    def compare(
        self,
        kept: str,
        approximate_QN: np.ndarray,
        exact_QN: np.ndarray,
        allowed: float,
        projection: Projection | None,
    ) -> Fidelity:
        """`allowed`: the norm of the differences that theory allows."""
        settings = dataclasses.replace(self.gradients.settings, projection=projection)
        numbers = sum(settings.width(self.gradients.run.columns[name]) for name in self.columns)
        scale = float(np.linalg.norm(exact_QN)) or 1e-300
        pairs = list(zip(approximate_QN, exact_QN, strict=True))
        return Fidelity(
            kept,
            float(np.linalg.norm(approximate_QN - exact_QN)) / scale,
            allowed / scale,
            mean_without_nan([pearson(a, b) for a, b in pairs]),
            mean_without_nan([spearman(a, b) for a, b in pairs]),
            float(np.mean([top_overlap(a, b) for a, b in pairs])),
            exact_QN.shape,
            numbers,
        )


def top_overlap(a: np.ndarray, b: np.ndarray) -> float:
    """The share of the highest scores that two rows have in common."""
    top = min(TOP, len(a))
    return len(set(np.argsort(-a)[:top]) & set(np.argsort(-b)[:top])) / top


def mean_without_nan(values: Sequence[float]) -> float:
    numbers = [value for value in values if not math.isnan(value)]
    return float(np.mean(numbers)) if numbers else math.nan


def measure_fidelity(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
) -> list[Fidelity]:
    """The run's projection compared with exact scores, and the same as the cache stores it.

    Empty if the run neither projects nor stores in fewer bits.
    """
    settings = gradients.settings
    projection = settings.projection
    narrow = STORE_EPS[settings.storage_dtype] > STORE_EPS[settings.precision]
    if projection is None and not narrow:
        return []
    sample = Sample.draw(gradients, checkpoints, columns, ids)
    project = projected_by(projection) if projection else keep_exact
    keeps: dict[str, KeepForm] = {
        "exact": keep_exact,
        "projected": project,
        "stored": lambda name, form: as_stored(project(name, form), settings.storage_dtype),
    }
    scores, norms_CQN = sample.compute_scores(keeps)
    name = f"{projection.kind} {projection.numbers}" if projection else ""
    spread = projection_spread(projection, sample, norms_CQN) if projection else 0.0
    results = []
    if projection:
        results.append(
            sample.compare(name, scores["projected"], scores["exact"], spread, projection)
        )
    if narrow:
        dtype = str(settings.storage_dtype).removeprefix("torch.")
        allowed = (
            8 * STORE_EPS[settings.storage_dtype] * float(np.linalg.norm(norms_CQN.sum(0))) + spread
        )
        kept = f"{name} in {dtype}" if projection else dtype
        results.append(sample.compare(kept, scores["stored"], scores["exact"], allowed, projection))
    return results


def check_fidelity(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
    kind: str | None,
    target: float | None,
) -> list[Finding]:
    """The findings of `check`: compares the kept gradients with theory and with the target
    correlation, and names the smallest K that reaches the target.
    """
    findings = []
    for kept in measure_fidelity(gradients, checkpoints, columns, ids):
        findings.append(
            Finding("fidelity", "pairs", kept.kept, kept.error, kept.allowed, str(kept))
        )
        if target is not None:
            note = f"correlation {kept.reached:.4f}, target {target}"
            findings.append(
                Finding("target", "pairs", kept.kept, 1 - kept.reached, 1 - target, note)
            )
    if target is not None:
        last = search_projection(gradients, checkpoints, columns, ids, kind, target)[-1]
        result = "the first that reaches it" if last.reached >= target else "the last tried"
        subject = f"{last.kept}: {result}"
        findings.append(
            Finding("target", "pairs", subject, 1 - last.reached, 1 - target, str(last))
        )
    return findings


def search_projection(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
    kind: str | None,
    target: float,
) -> list[Fidelity]:
    """Projections of rising K, up to the first whose Spearman and Pearson correlations both reach
    the target, or to the last K.

    `kind` None: that of the run, else tensor-sketch.
    """
    sample, results = Sample.draw(gradients, checkpoints, columns, ids), []
    current = gradients.settings.projection
    kind = kind or (current.kind if current else "tensor-sketch")
    for ladder in SQUARE_LADDERS if kind == "kronecker" else LADDERS:
        projections = [Projection(kind, k, current.seed if current else 0) for k in ladder]
        keeps: dict[str, KeepForm] = {"exact": keep_exact}
        keeps |= {projection.key: projected_by(projection) for projection in projections}
        scores, norms_CQN = sample.compute_scores(keeps)
        for projection in projections:
            name = f"{kind} {projection.numbers}"
            spread = projection_spread(projection, sample, norms_CQN)
            results.append(
                sample.compare(name, scores[projection.key], scores["exact"], spread, projection)
            )
            if results[-1].reached >= target:
                return results
    return results


def keep_exact(name: str, form: Form) -> Form:
    return form


def projected_by(projection: Projection) -> KeepForm:
    return lambda name, form: projection(name, form)[1]


def projection_spread(projection: Projection, sample: Sample, norms_CQN: np.ndarray) -> float:
    """Twice the standard deviation that theory allows for the differences of all pairs together,
    plus rounding error.

    Rounding: a product of gradients that are kept exactly uses another form than the exact one.
    """
    shapes = [sample.gradients.run.columns[name].shape for name in sample.columns]
    spreads_C = np.array([projection.spread(shape) for shape in shapes])
    spreads_CQN = spreads_C[:, None, None] * norms_CQN
    double = sample.gradients.settings.precision == torch.float64
    eps = STORE_EPS[torch.float64 if double else torch.float32]
    rounding = 8 * eps * float(np.linalg.norm(norms_CQN.sum(0)))
    return 2 * float(np.sqrt(np.square(spreads_CQN).sum())) + rounding
