"""Vectors whose inner products are scores, for methods that sum such products over checkpoints.

scores_NQ = train_NK @ queries_QK.T

K: the numbers of all columns at the first checkpoint, then at the next. The learning-rate weights
are in the query vectors only. With --normalize both sides are divided by their norms.

Letters: N train, Q query, n some of them, K numbers of a vector, D numbers of a parameter.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.errors import GradientError, counted
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.gradients.sparse_forms import Postings
from influence_cli.methods.declaration import OpenVectors
from influence_cli.methods.inner_products import SquaredNorms, bytes_per_query, inverse_norms
from influence_cli.methods.pairwise import MapRows, mean_query_row, query_rows
from influence_cli.methods.query_passes import plan_passes
from influence_cli.methods.request import ScoreRequest

PART_BYTES = 32 << 20  # of float64 vectors in memory
SMALL_NUMBER = 1e-30  # a vector whose largest number is smaller loses digits in float32

Block = tuple[int, int, np.ndarray]  # first row, first column, numbers (n, k) float32


@dataclass(frozen=True)
class VectorMaps:
    """How a method's vectors differ from gradients: `map_queries` and `train_sqnorms` as in
    inner_products.score.
    """

    map_queries: MapRows | None = None
    train_sqnorms: SquaredNorms | None = None


@dataclass(frozen=True)
class Stretch:
    """Where the numbers of a parameter at a checkpoint are in a vector, and their weight."""

    step: int
    parameter: str
    start: int
    stop: int
    weight: float


def gradient_maps(source: GradientSource, request: ScoreRequest) -> VectorMaps:
    """The vectors are the gradients themselves."""
    return VectorMaps()


class GradientVectors:
    """The vectors of both sides of a request, block by block."""

    def __init__(self, source: GradientSource, request: ScoreRequest) -> None:
        self.source, self.request, self.maps = source, request, VectorMaps()
        self.layout = tuple(list_stretches(source, request))
        self.width = self.layout[-1].stop
        self._small = 0  # vectors that lose digits

    def open(self, open_vectors: OpenVectors) -> None:
        """Before any block: what the method makes of gradients, which may take long."""
        self.maps = open_vectors(self.source, self.request)

    def query_blocks(self) -> Iterator[Block]:
        """Rows in the order of the query ids; one row, the mean, with --sum-queries."""
        source, request = self.source, self.request
        rows_of = mean_query_row if request.sum_queries else query_rows
        source.ensure("query", request.checkpoints, list(request.columns), request.queries)
        passes = plan_passes(source, request, bytes_per_query(source, request)).passes
        for number, checkpoint in enumerate(request.checkpoints):
            first = 0
            for ids in passes:
                rows = rows_of(source, request, checkpoint, ids, self.maps.map_queries)
                yield from self._blocks(number, first, rows, weighted=True)
                first += len(rows.ids)

    def train_blocks(self) -> Iterator[Block]:
        """Rows in the order of the training ids. Raises InfluenceError as scores do."""
        source, request = self.source, self.request
        columns, count = list(request.columns), len(request.train)
        read = source.prepare("train", request.checkpoints, columns, request.train)
        total = count * len(request.checkpoints)
        with source.reporter.progress("vectors", total) as advance:
            first = 0  # counts on over all checkpoints
            for rows in read((checkpoint, request.train) for checkpoint in request.checkpoints):
                if request.normalize and self.maps.train_sqnorms is not None:
                    rows = dataclasses.replace(rows, sqnorms=self.maps.train_sqnorms(rows))
                yield from self._blocks(first // count, first % count, rows, weighted=False)
                first += len(rows.ids)
                advance(len(rows.ids))
        report_numbers(source, request.checkpoints, columns)
        if self._small:
            source.reporter.note(
                f"{counted(self._small, 'vector has', 'vectors have')} no number above "
                f"{SMALL_NUMBER:g} at a checkpoint: float32 keeps few digits of them. Choose a "
                "larger --lr, or --lr-weights none"
            )

    def _blocks(
        self, number: int, first: int, rows: GradientRows, weighted: bool
    ) -> Iterator[Block]:
        """The vectors of some rows at a checkpoint, of which `first` rows came before."""
        per_checkpoint = len(self.request.columns)
        stretches = self.layout[number * per_checkpoint : (number + 1) * per_checkpoint]
        start, width = stretches[0].start, stretches[-1].stop - stretches[0].start
        size = max(1, PART_BYTES // (8 * width))
        by_example = {name: as_rows(form) for name, form in rows.forms.items()}
        for part in dataclasses.replace(rows, forms=by_example).parts(size):
            values_nK = torch.empty(len(part.ids), width, dtype=torch.float64)
            for stretch in stretches:
                factor = stretch.weight if weighted else 1.0
                columns = slice(stretch.start - start, stretch.stop - start)
                for at, dense_nD in part.forms[stretch.parameter].parts():
                    values_nK[at, columns] = dense_nD.cpu().double() * factor
            if self.request.normalize:
                values_nK *= inverse_norms(part).cpu()[:, None]
            yield first, start, self._as_float32(values_nK).numpy()
            first += len(part.ids)

    def _as_float32(self, values_nK: Tensor) -> Tensor:
        """Raises GradientError for numbers that float32 can't hold; counts small vectors."""
        largest_n = values_nK.abs().amax(1)
        if not bool((largest_n <= torch.finfo(torch.float32).max).all()):  # or NaN
            raise GradientError(
                f"a vector holds {float(largest_n.max()):g}, which float32 can't hold",
                "choose a smaller --lr, or --lr-weights none; look for a loss that is scaled up",
            )
        self._small += int(((largest_n > 0) & (largest_n < SMALL_NUMBER)).sum())
        return values_nK.float()


def list_stretches(source: GradientSource, request: ScoreRequest) -> Iterator[Stretch]:
    """Checkpoint by checkpoint, parameter by parameter."""
    start = 0
    for checkpoint, weight in zip(request.checkpoints, request.weights, strict=True):
        for name, column in request.columns.items():
            stop = start + source.settings.width(column)
            yield Stretch(checkpoint.step, name, start, stop, weight.of(column.names))
            start = stop


def as_rows(form: Form) -> Form:
    """A form that is cut into examples without looking at all of it."""
    return form.rows() if isinstance(form, Postings) else form
