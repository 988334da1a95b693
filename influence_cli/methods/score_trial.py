"""A small part of a score by inner products. `inspect` runs it to measure what all of it takes.

Letters: B training examples of a batch, Q query, P parts of a score, D gradient.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.quantize import as_stored
from influence_cli.cache.unit_file import Unit, decode_unit, encode_unit
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Dense, Form
from influence_cli.methods.inner_products import (
    QueryGradients,
    add_products,
    bytes_per_query,
    captured_scores,
)
from influence_cli.methods.query_passes import PassPlan, plan_passes
from influence_cli.methods.request import ScoreRequest

SAMPLE = 64  # queries whose gradients are computed; the others repeat them


def silent(examples: int, where: str = "") -> None:
    pass


@dataclass(frozen=True)
class ScoreTrial:
    """Products with the queries of one pass, at the first checkpoint.

    `request`: of that checkpoint. `plan`: the passes of the whole request. `stored`: the request
    keeps training gradients in a cache.
    """

    source: GradientSource
    request: ScoreRequest
    plan: PassPlan
    queries: QueryGradients
    stored: bool

    @property
    def pass_bytes(self) -> int:
        """Memory of the queries of a pass, at one checkpoint."""
        return sum(query.form.nbytes for query in self.queries.scaled.values())

    @property
    def path(self) -> str:
        """How `score` multiplies training gradients that it computes: `stored`, in `blocks` with
        one pass after the other, or `fused` with the backward pass.
        """
        if self.stored:
            return "stored"
        return "blocks" if self.plan.disk_bytes else "fused"

    def compute(self, ids: np.ndarray) -> None:
        """Compute the gradients of these training examples, and multiply them as `score` does."""
        if self.path == "fused":
            captured_scores(self.source, self.request, [self.queries], ids, silent)
            return
        columns = list(self.request.columns)
        checkpoint = self.request.checkpoints[0]
        rows = self.source.extractor.rows_at(checkpoint, "train", columns, ids)
        if self.stored:
            start, stop = int(ids[0]), int(ids[-1]) + 1
            unit = Unit(Path(), "trial", tuple(columns), "values", "", start, stop, ids)
            content = encode_unit(unit, rows, self.source.settings.storage_dtype)
            rows = decode_unit(unit, content)
        for _ in self.plan.passes if self.path == "blocks" else range(1):
            self.multiply(rows)

    def multiply(self, rows: GradientRows) -> None:
        """Multiply training gradients with the queries of one pass."""
        place = self.source.device if self.source.device.type == "cuda" else torch.device("cpu")
        shape = 1 + len(self.request.parts), len(self.queries.inverse_Q), len(rows.ids)
        totals_PQB = torch.zeros(shape, dtype=torch.float64, device=place)
        add_products(
            self.source.device, self.request, self.queries, iter([rows]), totals_PQB, silent
        )


def open_trial(source: GradientSource, request: ScoreRequest, stored: bool) -> ScoreTrial:
    """`stored`: the request has a cache, which may not exist yet."""
    plan = plan_passes(source, request, bytes_per_query(source, request), stored)
    first = dataclasses.replace(
        request, checkpoints=request.checkpoints[:1], weights=request.weights[:1]
    )
    rows = repeated_queries(source, first, min(plan.pass_size, len(request.queries)), stored)
    by_column = not (stored or plan.disk_bytes)
    queries = QueryGradients.of(first, 0, rows, not by_column, source.device)
    return ScoreTrial(source, first, plan, queries, stored)


def repeated_queries(
    source: GradientSource, request: ScoreRequest, count: int, stored: bool
) -> GradientRows:
    """Gradients of `count` queries at the first checkpoint, which are those of SAMPLE queries again
    and again; with --sum-queries one row, in the form of a mean.
    """
    columns, dtype = list(request.columns), source.settings.storage_dtype
    ids = np.asarray(request.queries[:SAMPLE])
    rows = source.extractor.rows_at(request.checkpoints[0], "query", columns, ids)
    wide = torch.float64 if source.settings.precision == torch.float64 else torch.float32
    forms: dict[str, Form] = {
        name: (as_stored(form, dtype) if stored else form).to(torch.device("cpu"), wide)
        for name, form in rows.forms.items()
    }
    if request.sum_queries:
        ones = torch.ones(len(ids), 1, dtype=torch.float64)
        means: dict[str, Form] = {}
        for name, form in forms.items():
            total = form.to(form.device, ones.dtype).rmatvec(ones).T
            means[name] = Dense(request.columns[name].shape, total.to(wide))
        return dataclasses.replace(rows.take(np.zeros(1, dtype=np.int64)), forms=means)
    rows = dataclasses.replace(rows, forms=forms).take(np.arange(count) % len(ids))
    as_queries: dict[str, Form] = {name: form.as_queries() for name, form in rows.forms.items()}
    return dataclasses.replace(rows, forms=as_queries)
