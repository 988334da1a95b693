"""Runs the model over batches and captures per-example gradients."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import Settings
from influence_cli.cache.unit_file import Level
from influence_cli.errors import (
    DefinitionError,
    GradientError,
    InfluenceError,
    is_out_of_memory,
    listed,
)
from influence_cli.extraction.memory_budget import AnyCapture, MemoryBudget
from influence_cli.gradients.batches import leaves, to
from influence_cli.gradients.buffers import FormBuffer
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.gradients.forms import Form
from influence_cli.gradients.probe_checks import check_loss_order
from influence_cli.gradients.quantity import LossCountError, checked, plain_attention
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.progress import Advance, Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.run import Run

ORDER_SAMPLE = 8  # examples whose losses are compared in a batch and alone


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
        self.cast, self.reporter = cast, reporter
        self.budget = MemoryBudget(
            settings,
            device,
            record_folder,
            requested_batch_size,
            self.capture_for,
            lambda split: len(run.examples(split)),
        )
        self._with_digests = record_folder is not None
        self._captures: dict[tuple[str, tuple[str, ...]], AnyCapture] = {}

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

        If a device runs out of memory, the batch size is halved and recorded, and the work
        repeated.
        """
        while True:
            done = 0

            def count(examples: int) -> None:
                nonlocal done
                done += examples
                advance(examples, where)

            size = self.budget.batch_size(split, columns)
            try:
                return self._rows_in_batches(weights, split, columns, ids, size, level, count)
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
        advance: Callable[[int], None],
    ) -> GradientRows:
        capture = self.capture_for(split, columns)
        losses, digests = [], []
        sqnorms: dict[str, list[torch.Tensor]] = {name: [] for name in columns}
        buffer = FormBuffer(len(ids))
        for first in range(0, len(ids), size):
            batch_ids = ids[first : first + size]
            batch, single = self.batch(split, batch_ids)
            try:
                captured = capture(batch, single, len(batch_ids), level == "values")
            except LossCountError as error:
                self._refuse_dropped(split, batch_ids)
                raise error
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                raise self.explained(split, error, len(batch_ids)) from error
            losses.append(captured.losses)
            for name in columns:
                sqnorms[name].append(captured.sqnorms[name])
            if level == "values":
                buffer.add(captured.forms)
            digests.append(self._digests(split, batch_ids))
            if self.device.type == "cpu":  # a GPU would have to finish each batch for this check
                check_finite(weights, split, batch_ids, captured.losses, captured.sqnorms)
            advance(len(batch_ids))
        all_losses = torch.cat(losses).cpu()
        all_norms = {name: torch.cat(values).cpu() for name, values in sqnorms.items()}
        if self.device.type != "cpu":
            check_finite(weights, split, ids, all_losses, all_norms)
        if self._with_digests and self.settings.precision == torch.float64:
            check_storable(weights, split, self.settings.storage_dtype, all_norms)
        forms = {name: self._kept_form(name, form) for name, form in buffer.done().items()}
        return GradientRows(ids, all_losses, torch.cat(digests), all_norms, forms)

    def _digests(self, split: str, ids: np.ndarray) -> torch.Tensor:
        if self._with_digests:
            return self.run.examples(split).digests(ids)
        return torch.zeros(len(ids), dtype=torch.int64)

    def _kept_form(self, column: str, form: Form) -> Form:
        """Rows of an embedding's output go by token, an inverted index."""
        if column in self.run.embeddings and isinstance(form, EmbeddingRows):
            return Postings.of(form)
        return form

    # ------------------------------------------------------------ batches and captures
    def batch(
        self, split: str, ids: np.ndarray, cast: torch.dtype | None = None
    ) -> tuple[Any, Callable[[int], Any]]:
        """A batch on the device, and a function that gives its examples as batches of one.

        `cast`: dtype of floating tensors, None for the run's. The batch is what the user collates.
        """
        examples = self.run.examples(split)

        def single(i: int) -> Any:  # a batch of any type
            return to(examples.batch(ids[i : i + 1]), self.device, cast or self.cast)

        try:
            return to(examples.batch(ids), self.device, cast or self.cast), single
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise self.explained(split, error, len(ids)) from error

    def capture_for(self, split: str, columns: Sequence[str]) -> AnyCapture:
        """The capture of these columns. A new one is probed on the first two examples, with the
        weights that the model holds, or with those of the first checkpoint.
        """
        key = (split, tuple(columns))
        if key not in self._captures:
            self.run.model.at_any(self.run.checkpoints[0])
            capture = self._new_capture(split, columns)
            self._probe(split, capture)
            self._captures[key] = capture
        return self._captures[key]

    def quantity_name(self, split: str) -> str:
        """The user's function whose gradients are computed: `loss()`, of queries `measure()`."""
        measured = split == "query" and self.run.definition.has("measure")
        return "measure()" if measured else "loss()"

    def _new_capture(self, split: str, columns: Sequence[str]) -> AnyCapture:
        definition, module = self.run.definition, self.run.model.module
        name = self.quantity_name(split).removesuffix("()")
        measured = name == "measure"
        function = definition.raw(name)

        def quantity(model: torch.nn.Module, batch: Any) -> Any:  # the user's batch and tensor
            value = function(model, batch)
            return -value if measured and isinstance(value, torch.Tensor) else value

        note = self.reporter.note
        if len(columns) == 1 and columns[0] not in self.run.columns:
            output = self.run.embeddings.get(columns[0])
            if output is not None and output.module is not None:
                return EmbeddingCapture(
                    module, quantity, output.name, output.module, f"{name}()", note
                )
        embeddings = [column for column in columns if self.run.columns[column].embedding]
        return Capture(
            module, quantity, columns, embeddings, f"{name}()", note, self.settings.projection
        )

    def _probe(self, split: str, capture: AnyCapture) -> None:
        examples = self.run.examples(split)
        first = np.arange(min(2, len(examples)))
        examples.check_stable(range(min(4, len(examples))))
        batch, single = self.batch(split, first)
        try:
            capture.probe(batch, [single(i) for i in range(len(first))])
            self._check_order(split, capture)
        except LossCountError as error:
            self._refuse_dropped(split, first)
            raise error
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise self.explained(split, error, len(first)) from error

    def _check_order(self, split: str, capture: AnyCapture) -> None:
        """Raise GradientError where a batch has its examples in another order."""
        most = self.budget.requested_batch_size or ORDER_SAMPLE
        ids = np.arange(min(ORDER_SAMPLE, most, len(self.run.examples(split))))
        batch, single = self.batch(split, ids)

        def losses(examples: Any, size: int) -> torch.Tensor:  # a batch of any type
            values = capture.quantity(self.run.model.module, examples)
            return checked(capture.name, values, size, traced=True).detach()

        with plain_attention(), torch.enable_grad():  # the loss may take gradients itself
            together = losses(batch, len(ids))
            alone = torch.cat([losses(single(i), 1) for i in range(len(ids))])
        check_loss_order(capture.name, together, alone)

    def _refuse_dropped(self, split: str, ids: np.ndarray) -> None:
        """Raise DefinitionError where collate() returns fewer examples than it got."""
        if not self.run.definition.has("collate"):
            return

        def lacks_some(some: np.ndarray) -> bool:
            sizes = [len(tensor) for tensor in leaves(self.batch(split, some)[0]) if tensor.ndim]
            return bool(sizes) and max(sizes) < len(some)

        dropped = [int(index) for index in ids if lacks_some(np.array([index]))]
        if dropped or lacks_some(ids):
            which = f"; it drops item {listed(dropped)}" if dropped else ""
            raise DefinitionError(
                f"collate() returned fewer examples than it got items of {split}_data(){which}",
                "expected: each item, in the same order",
                "leave examples out in train_data() and query_data(), or with --train, --queries",
            )

    def ways(self, split: str, columns: Sequence[str]) -> dict[str, str]:
        """How the gradients of each column are computed: by a layer rule, by torch.func, one by
        one.
        """
        capture = self.capture_for(split, columns)
        if isinstance(capture, EmbeddingCapture):
            return dict.fromkeys(columns, "at the output" if capture.at_once else "one by one")
        if not capture.at_once:
            return dict.fromkeys(columns, "one by one")
        return {name: "rule" if name in capture.hooked else "torch.func" for name in columns}

    def explained(self, split: str, error: Exception | SystemExit, size: int) -> InfluenceError:
        """The error to raise for an exception in the user's functions, in a batch of `size`."""
        text = str(error)
        if is_out_of_memory(error):
            return GradientError(
                f"out of memory: gradients of a batch of {size}",
                text.splitlines()[0] if text else type(error).__name__,
                "--batch-size N computes fewer examples at once; "
                "--layers GLOB selects fewer parameters; finished units are kept",
            )
        name = self.quantity_name(split).removesuffix("()")
        return describe_failure(self.run.definition, name, error)


def check_finite(
    weights: str,
    split: str,
    ids: np.ndarray,
    losses: torch.Tensor,
    sqnorms: dict[str, torch.Tensor],
) -> None:
    """Raise GradientError, naming the example, where a loss or a gradient's norm is not finite."""
    named = {"the loss": losses}
    named |= {f"the gradient of {column}": norms for column, norms in sqnorms.items()}
    for name, values in named.items():
        wrong = ids[~torch.isfinite(values).cpu().numpy()]
        if len(wrong):
            raise GradientError(
                f"{name} is not finite at {weights}, example {wrong[0]} of {split}_data()",
                f"{len(wrong)} of the {len(ids)} examples of its batch: {listed(wrong)}",
                "look at that example and the loss; --precision float64 helps against overflow;"
                " --steps or --train leaves it out",
            )


def check_storable(
    weights: str, split: str, store: torch.dtype, sqnorms: dict[str, torch.Tensor]
) -> None:
    """Raise GradientError where float64 gradients leave the range of a narrower store: all are too
    small, or one is too large. Every narrower store has the range of float32.
    """
    limits = torch.finfo(torch.float32)
    largest = max(float(norms.max()) for norms in sqnorms.values()) ** 0.5
    if store != torch.float64 and (0 < largest < limits.tiny * 100 or largest > limits.max / 100):
        raise GradientError(
            f"gradients of {split}_data() at {weights} do not fit into --store "
            f"{str(store).removeprefix('torch.')}: the largest norm is {largest:.3g}",
            f"expected: between {limits.tiny * 100:.3g} and {limits.max / 100:.3g}",
            "--store float64, or --cache none; look for a loss that is scaled",
        )
