"""How far projected gradients, and numbers stored in few bits, are from exact ones: on a sample of
the run's own pairs.

A pair's score here is the inner product of its gradients, summed over parameters and over the
checkpoints looked at. Sampled examples are taken exactly, a few at a time, and multiplied as they
are, as they would be projected, and as they would be read from disk.

N train, Q query.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.quantize import STORE_EPS, as_stored
from influence_cli.diagnostics.gradient_check import Finding, spread
from influence_cli.evaluate.correlation import pearson, spearman
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.gradients.projection import Projection
from influence_cli.run.checkpoints import Checkpoint

TRAIN, QUERIES, CHECKPOINTS, TOP = 200, 20, 3, 10
QUERY_BYTES = 1 << 30  # exact gradients of the sampled queries; at least two
STEP = 16  # training examples held at once
LADDERS = (
    (16, 32, 64, 128, 256, 512),
    (1024, 2048, 4096, 8192),
)  # K that are tried; the second where the first are not enough
SQUARES = ((16, 64, 256, 1024), (4096, 16384))

Way = Callable[[str, Form], Form]  # of a column: how its gradients are kept


@dataclass(frozen=True)
class Fidelity:
    """How scores from stored gradients differ from exact ones.

    `error`: |S' - S| / |S| over all pairs. `allowed`: the most that is expected. The others are
    means over the queries; nan where no query's scores vary.
    """

    kept: str
    error: float
    allowed: float
    pearson: float
    spearman: float
    overlap: float  # of the ten highest
    pairs: tuple[int, int]
    numbers: int  # of one example, as dense gradients

    @property
    def reached(self) -> float:
        """The smaller of the two correlations; of scores that do not vary at all 0."""
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
    def of(
        cls,
        gradients: GradientSource,
        checkpoints: Sequence[Checkpoint],
        columns: Sequence[str],
        ids: Mapping[str, Ids],
    ) -> "Sample":
        numbers = sum(gradients.run.columns[name].numel for name in columns) * max(
            4, gradients.settings.precision.itemsize
        )
        most = max(2, min(QUERIES, QUERY_BYTES // numbers))
        chosen = tuple(checkpoints[i] for i in spread(len(checkpoints), CHECKPOINTS))
        train, queries = (
            np.array([ids[s][i] for i in spread(len(ids[s]), n)])
            for s, n in (("train", TRAIN), ("query", most))
        )
        return cls(gradients.exact(), chosen, tuple(columns), train, queries)

    def scores(self, ways: Mapping[str, Way]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Of each way (Q, N) float64 scores; and for each column (columns, Q, N) the products of
        the norms, summed over checkpoints.
        """
        scores = {way: np.zeros((len(self.queries), len(self.train))) for way in ways}
        norms = np.zeros((len(self.columns), len(self.queries), len(self.train)))
        with self.gradients.reporter.progress(
            "exact gradients to compare with", len(self.checkpoints) * len(self.train)
        ) as advance:
            for checkpoint in self.checkpoints:
                queries = concat_rows(list(self.read("query", checkpoint, self.queries)))
                kept = {
                    way: {name: keep(name, queries.forms[name]).ready() for name in self.columns}
                    for way, keep in ways.items()
                }
                for first in range(0, len(self.train), STEP):
                    at = slice(first, first + STEP)
                    rows = concat_rows(list(self.read("train", checkpoint, self.train[at])))
                    for way, keep in ways.items():
                        for name in self.columns:
                            scores[way][:, at] += (
                                keep(name, rows.forms[name]).dot(kept[way][name]).double().T.numpy()
                            )
                    for k, name in enumerate(self.columns):
                        norms[k, :, at] += np.sqrt(
                            np.outer(queries.sqnorms[name], rows.sqnorms[name])
                        )
                    advance(len(rows.ids))
        return scores, norms

    def read(self, split: str, checkpoint: Checkpoint, ids: np.ndarray) -> Iterator[GradientRows]:
        for first in range(0, len(ids), STEP):
            yield from self.gradients.read(
                split, checkpoint, self.columns, ids[first : first + STEP]
            )

    def compare(
        self,
        kept: str,
        approximate: np.ndarray,
        exact: np.ndarray,
        expected: float,
        projection: Projection | None,
    ) -> Fidelity:
        """`expected`: the norm of the differences that is to be expected at most."""
        settings = dataclasses.replace(self.gradients.settings, projection=projection)
        numbers = sum(settings.width(self.gradients.run.columns[name]) for name in self.columns)
        scale = float(np.linalg.norm(exact)) or 1e-300
        top = min(TOP, exact.shape[1])
        shared = [
            len(set(np.argsort(-a)[:top]) & set(np.argsort(-b)[:top])) / top
            for a, b in zip(approximate, exact, strict=True)
        ]
        linear, ranked = (
            mean([of(a, b) for a, b in zip(approximate, exact, strict=True)])
            for of in (pearson, spearman)
        )
        error = float(np.linalg.norm(approximate - exact)) / scale
        return Fidelity(
            kept,
            error,
            expected / scale,
            linear,
            ranked,
            float(np.mean(shared)),
            exact.shape,
            numbers,
        )


def fidelity(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
) -> list[Fidelity]:
    """What the run's projection does to exact scores, and what it does as it is stored; nothing
    where both are exact.
    """
    settings = gradients.settings
    projection, narrow = (
        settings.projection,
        STORE_EPS[settings.store] > STORE_EPS[settings.precision],
    )
    if projection is None and not narrow:
        return []
    sample = Sample.of(gradients, checkpoints, columns, ids)
    project = projected(projection) if projection else exactly
    ways: dict[str, Way] = {
        "exact": exactly,
        "projected": project,
        "stored": lambda name, form: as_stored(project(name, form), settings.store),
    }
    scores, norms = sample.scores(ways)
    results = []
    if projection:
        expected = spread_of(projection, sample, norms)
        results.append(
            sample.compare(
                f"{projection.kind} {projection.numbers}",
                scores["projected"],
                scores["exact"],
                expected,
                projection,
            )
        )
    if narrow:
        expected = 8 * STORE_EPS[settings.store] * float(np.linalg.norm(norms.sum(0)))
        expected += spread_of(projection, sample, norms) if projection else 0.0
        dtype = str(settings.store).removeprefix("torch.")
        kept = f"{projection.kind} {projection.numbers} in {dtype}" if projection else dtype
        results.append(
            sample.compare(kept, scores["stored"], scores["exact"], expected, projection)
        )
    return results


def fidelity_findings(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
    kind: str | None,
    target: float | None,
) -> list[Finding]:
    """As rows of `influence check`: what is kept, against what theory allows and against the
    target; and the smallest K that reaches it.
    """
    rows = []
    for kept in fidelity(gradients, checkpoints, columns, ids):
        rows.append(Finding("fidelity", "pairs", kept.kept, kept.error, kept.allowed, str(kept)))
        if target is not None:
            rows.append(
                Finding(
                    "target",
                    "pairs",
                    kept.kept,
                    1 - kept.reached,
                    1 - target,
                    f"correlation {kept.reached:.4f}, asked {target}",
                )
            )
    if target is not None:
        tried = search(gradients, checkpoints, columns, ids, chosen_kind(gradients, kind), target)
        note = "the first that reaches it" if tried[-1].reached >= target else "the last tried"
        rows.append(
            Finding(
                "target",
                "pairs",
                f"{tried[-1].kept}: {note}",
                1 - tried[-1].reached,
                1 - target,
                str(tried[-1]),
            )
        )
    return rows


def chosen_kind(gradients: GradientSource, kind: str | None) -> str:
    return kind or (
        gradients.settings.projection.kind if gradients.settings.projection else "tensor-sketch"
    )


def search(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
    kind: str,
    target: float,
) -> list[Fidelity]:
    """Projections of rising K, up to the first whose Spearman and Pearson correlations both reach
    the target, or to the last tried.
    """
    sample, results = Sample.of(gradients, checkpoints, columns, ids), []
    seed = gradients.settings.projection.seed if gradients.settings.projection else 0
    for ladder in SQUARES if kind == "kronecker" else LADDERS:
        maps = [Projection(kind, numbers, seed) for numbers in ladder]
        ways: dict[str, Way] = {"exact": exactly} | {
            projection.key: projected(projection) for projection in maps
        }
        scores, norms = sample.scores(ways)
        for projection in maps:
            kept, expected = f"{kind} {projection.numbers}", spread_of(projection, sample, norms)
            results.append(
                sample.compare(kept, scores[projection.key], scores["exact"], expected, projection)
            )
            if results[-1].reached >= target:
                return results
    return results


def exactly(name: str, form: Form) -> Form:
    return form


def projected(projection: Projection) -> Way:
    return lambda name, form: projection(name, form)[1]


def spread_of(projection: Projection, sample: Sample, norms: np.ndarray) -> float:
    """Twice the standard deviation that theory allows the differences of all pairs together, and
    rounding: what is kept exactly is multiplied in another form.
    """
    shapes = [sample.gradients.run.columns[name].shape for name in sample.columns]
    spreads = np.array([projection.spread(shape) for shape in shapes])[:, None, None] * norms
    eps = STORE_EPS[
        torch.float64 if sample.gradients.settings.precision == torch.float64 else torch.float32
    ]
    return 2 * float(np.sqrt(np.square(spreads).sum())) + 8 * eps * float(
        np.linalg.norm(norms.sum(0))
    )


def mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan
