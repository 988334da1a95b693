"""Runs the model over batches and captures per-example gradients."""

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import Settings
from influence_cli.cache.unit_file import Level
from influence_cli.errors import (
    GradientError,
    InfluenceError,
    is_out_of_memory,
)
from influence_cli.extraction.batches import Batches
from influence_cli.extraction.captures import Captures
from influence_cli.extraction.memory_budget import MemoryBudget
from influence_cli.extraction.number_checks import check_finite, check_storable
from influence_cli.gradients.buffers import FormBuffer
from influence_cli.gradients.capture import Keep, Kept
from influence_cli.gradients.forms import Form
from influence_cli.gradients.quantity import LossCountError
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.progress import Advance, Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import Run

# one batch: its place among the examples, losses (B,), and a result for each column
Visited = tuple[slice, torch.Tensor, dict[str, Kept]]
Counted = Callable[[int], None]
Result = TypeVar("Result")


class GradientExtractor:
    """Computes gradients of a run's examples, with the weights of a checkpoint or with the weights
    that the model holds. It stores nothing.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        device: torch.device,
        cast: torch.dtype | None,
        reporter: Reporter,
        requested_batch_size: int | None = None,
        record_folder: Path | None = None,
    ) -> None:
        """`cast`: dtype of floating batch tensors, None leaves them. `record_folder`: of measured
        sizes; with one, rows carry digests of their items, as the cache needs them."""
        self.run, self.settings, self.device = run, settings, device
        self.reporter = reporter
        self.batches = Batches(run, device, cast)
        self.captures = Captures(
            self.batches, settings, reporter, requested_batch_size, record_folder
        )
        self.budget = MemoryBudget(
            settings,
            device,
            record_folder,
            requested_batch_size,
            self.captures.measured,
            lambda split: len(run.examples(split)),
            lambda split: run.examples(split).key,
        )
        self._with_digests = record_folder is not None

    def with_batches(self, batches: Batches) -> "GradientExtractor":
        """The same of other batches of the run's examples, whose rows have no digests."""
        other = copy.copy(self)
        other.batches, other._with_digests = batches, False
        return other

    # ------------------------------------------------------------ rows
    def rows_at(
        self,
        checkpoint: Checkpoint,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
        level: Level = "values",
        advance: Advance = lambda examples, where="": None,
        where: str = "",
    ) -> GradientRows:
        """Rows of these examples with the weights of a checkpoint. Raises GradientError: a loss or
        a gradient that is not finite; out of memory; DefinitionError: a function of the user
        fails.
        """
        self.run.model.at(checkpoint)
        return self.rows(checkpoint.name, split, columns, ids, level, advance, where)

    def rows(
        self,
        weights: str,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
        level: Level = "values",
        advance: Advance = lambda examples, where="": None,
        where: str = "",
    ) -> GradientRows:
        """Rows of these examples with the weights that the model holds; `weights` names them in
        errors.
        """

        def compute(size: int, count: Counted) -> GradientRows:
            return self._rows_in_batches(weights, split, columns, ids, size, level, count)

        return self._in_batches_that_fit(split, columns, compute, advance, where)

    def visit_at(
        self,
        checkpoint: Checkpoint,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
        keep: Keep[Kept],
        take: Callable[[Visited[Kept]], None],
        advance: Advance = lambda examples, where="": None,
        where: str = "",
    ) -> None:
        """Give the gradients of each batch to `keep`, column by column while the backward pass
        runs, and then its results to `take`. It stores none of the gradients.

        A batch may come again in other cuts, after memory ran out. Raises as `rows_at` does.
        """
        self.run.model.at(checkpoint)

        def compute(size: int, count: Counted) -> None:
            losses = []
            for visited in self._visit(checkpoint.name, split, columns, ids, size, keep):
                losses.append(visited[1])
                take(visited)
                count(len(visited[1]))
            if self.device.type != "cpu":
                data = self.run.examples(split).source
                check_finite(checkpoint.name, data, ids, torch.cat(losses).cpu(), {})

        self._in_batches_that_fit(split, columns, compute, advance, where)

    def _in_batches_that_fit(
        self,
        split: str,
        columns: Sequence[str],
        compute: Callable[[int, Counted], Result],
        advance: Advance,
        where: str,
    ) -> Result:
        """compute(batch size, count). If a device runs out of memory, the batch size is halved and
        recorded, and the work repeated.
        """
        while True:
            done = 0

            def count(examples: int) -> None:
                nonlocal done
                done += examples
                advance(examples, where)

            size = self.budget.batch_size(split, columns)
            try:
                return compute(size, count)
            except GradientError as error:
                if not self._can_halve(size, error):
                    raise
                half = self.budget.halve_batch_size(split, columns)
                self.reporter.note(f"out of memory on {self.device}: batches of {half} from now on")
                advance(-done, where)
                torch.cuda.empty_cache()

    def _can_halve(self, size: int, error: GradientError) -> bool:
        fixed = self.device.type == "cpu" or self.budget.requested_batch_size or size == 1
        return not fixed and is_out_of_memory(error.__cause__ or error)

    def _rows_in_batches(
        self,
        weights: str,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
        size: int,
        level: Level,
        advance: Counted,
    ) -> GradientRows:
        finish = self.captures.of(split, columns).norms_and_form(level == "values")
        losses, digests, data = [], [], self.run.examples(split).source
        sqnorms: dict[str, list[torch.Tensor]] = {name: [] for name in columns}
        buffer = FormBuffer(len(ids))
        for at, batch_losses, results in self._visit(weights, split, columns, ids, size, finish):
            losses.append(batch_losses)
            for name in columns:
                sqnorms[name].append(results[name][0])
            if level == "values":
                forms = {name: form for name in columns if (form := results[name][1]) is not None}
                buffer.add(forms)
            digests.append(self._digests(split, ids[at]))
            if self.device.type == "cpu":  # a GPU would have to finish each batch for this check
                norms = {name: results[name][0] for name in columns}
                check_finite(weights, data, ids[at], batch_losses, norms)
            advance(len(batch_losses))
        all_losses = torch.cat(losses).cpu()
        all_norms = {name: torch.cat(values).cpu() for name, values in sqnorms.items()}
        if self.device.type != "cpu":
            check_finite(weights, data, ids, all_losses, all_norms)
        if self._with_digests and self.settings.precision == torch.float64:
            check_storable(weights, data, self.settings.storage_dtype, all_norms)
        forms = {name: self._kept_form(name, form) for name, form in buffer.done().items()}
        return GradientRows(ids, all_losses, torch.cat(digests), all_norms, forms)

    def _visit(
        self,
        weights: str,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
        size: int,
        keep: Keep[Kept],
    ) -> Iterator[Visited[Kept]]:
        """Capture batch after batch. It checks that losses are finite, on a CPU."""
        capture = self.captures.of(split, columns)
        places = [slice(first, min(first + size, len(ids))) for first in range(0, len(ids), size)]
        batches = self.batches.in_turn(split, (ids[at] for at in places))
        for at, (batch, single) in zip(places, batches, strict=True):
            try:
                losses, results = capture.visit(batch, single, len(ids[at]), keep)
            except LossCountError as error:
                self.batches.refuse_dropped(split, ids[at])
                raise error
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                raise self.batches.explained(split, error, len(ids[at])) from error
            if self.device.type == "cpu":
                check_finite(weights, self.run.examples(split).source, ids[at], losses, {})
            yield at, losses, results

    def _digests(self, split: str, ids: np.ndarray) -> torch.Tensor:
        if self._with_digests:
            return self.run.examples(split).digests(ids)
        return torch.zeros(len(ids), dtype=torch.int64)

    def _kept_form(self, column: str, form: Form) -> Form:
        """Rows of an embedding's output go by token, an inverted index."""
        if column in self.run.embeddings and isinstance(form, EmbeddingRows):
            return Postings.of(form)
        return form
