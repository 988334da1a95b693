"""The captures of a run: one for each quantity and set of columns, probed before any work."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from influence_cli.cache.identity import Settings
from influence_cli.errors import InfluenceError
from influence_cli.extraction.batches import Batches
from influence_cli.extraction.memory_budget import AnyCapture
from influence_cli.extraction.probe_record import (
    ProbeRecord,
    describe_model,
    read_record,
    record_path,
    write_record,
)
from influence_cli.gradients.batches import Batch, leaves
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.gradients.forms import Form
from influence_cli.gradients.probe_checks import check_loss_order
from influence_cli.gradients.quantity import LossCountError, checked, plain_attention
from influence_cli.gradients.tf32 import without_tf32
from influence_cli.gradients.tolerances import close
from influence_cli.progress import Reporter

SIZE_SAMPLE = 64  # examples among which a probe takes a large one
ORDER_SAMPLE = 6  # examples whose losses are compared in a batch and alone

Columns = tuple[str, ...]
Result = TypeVar("Result")
# forms of a few examples, and the bytes of one example's activations
Measured = tuple[dict[str, Form], float]


class Captures:
    """Both splits share a capture where they share loss(), and their batches are alike.

    `most`: examples of a batch by the user's wish, None for no wish. `folder`: remembers what a
    probe chose, so that the next command does not compare gradients again.
    """

    def __init__(
        self,
        batches: Batches,
        settings: Settings,
        reporter: Reporter,
        most: int | None,
        folder: Path | None = None,
    ) -> None:
        self.batches, self.run, self.settings = batches, batches.run, settings
        self._reporter, self._most = reporter, most
        self._captures: dict[tuple[str, Columns], AnyCapture] = {}
        self._measured: dict[tuple[str, Columns], Measured] = {}
        self._largest_examples: dict[str, int] = {}
        self._folder = folder
        self._records: dict[tuple[str, Columns], ProbeRecord] = {}

    def of(self, split: str, columns: Sequence[str]) -> AnyCapture:
        """The capture of these columns. A new one is probed on two examples, with the
        weights that the model holds, or with those of the first checkpoint.
        """
        key = split, tuple(columns)
        if key not in self._captures:
            self.run.model.at_any(self.run.checkpoints[0])
            self.run.examples(split).check_stable(range(min(4, len(self.run.examples(split)))))
            if split == "query" and self.run.query.given:
                self.of("train", columns)  # which a probe of a few rows must not choose
            if not self._restore(key) and not self._share(key):
                self._probe(key)
        return self._captures[key]

    def measured(self, split: str, columns: Sequence[str]) -> Measured:
        """What the probe measured."""
        key = split, tuple(columns)
        self.of(split, columns)
        if key not in self._measured:  # what the probe chose was remembered
            self._probe(key)
        return self._measured[key]

    def ways(self, split: str, columns: Sequence[str]) -> dict[str, str]:
        """How the gradients of each column are computed: by a layer rule, by torch.func, one by
        one.
        """
        capture = self.of(split, columns)
        if isinstance(capture, EmbeddingCapture):
            return dict.fromkeys(columns, "at the output" if capture.at_once else "one by one")
        if not capture.at_once:
            return dict.fromkeys(columns, "one by one")
        return {name: "rule" if name in capture.hooked else "torch.func" for name in columns}

    # ------------------------------------------------------------ probing
    def _probe(self, key: tuple[str, Columns]) -> None:
        """Probe a new capture, and remember what the probe chose."""
        split, columns = key
        notes: list[str] = []

        def note(message: str) -> None:
            notes.append(message)
            self._reporter.note(message)

        capture = self._new_capture(split, columns, note)
        with without_tf32(self.settings.tf32):  # it compares ways to compute a number
            self._on_first(split, lambda batch, singles: capture.probe(batch, singles))
            self._on_first(split, lambda batch, singles: self._in_order(split, capture))
        self._captures[key] = capture
        self._measured[key] = capture.sample, capture.activations
        self._remember(key, ProbeRecord(capture.choice, tuple(notes)))

    def _remember(self, key: tuple[str, Columns], record: ProbeRecord) -> None:
        self._records[key] = record
        if (path := self._record_path(key)) is not None:
            write_record(path, record)

    def _restore(self, key: tuple[str, Columns]) -> bool:
        """Take what an earlier command's probe chose, with its notes. False: none is remembered, or
        it does not fit.
        """
        split, columns = key
        path = self._record_path(key)
        record = read_record(path) if path is not None else None
        if record is None:
            return False
        other = "query" if split == "train" else "train", columns
        if self._records.get(other) == record and self._are_alike(split):
            capture = self._captures[other]
        else:
            capture = self._new_capture(split, columns, self._reporter.note)
            with without_tf32(self.settings.tf32):
                fits = self._on_first(
                    split, lambda batch, singles: capture.restore(record.choice, batch, singles)
                )
            if not fits:
                return False
        self._captures[key], self._records[key] = capture, record
        for message in record.notes:
            self._reporter.note(message)
        return True

    def _record_path(self, key: tuple[str, Columns]) -> Path | None:
        """Where a choice is remembered, by all that it depends on."""
        if self._folder is None:
            return None
        split, columns = key
        first = np.arange(min(ORDER_SAMPLE, len(self.run.examples(split))))
        parts = (
            self.run.definition.digest,
            self.batches.quantity_name(split),
            describe_model(self.run.model.module),
            columns,
            [(str(dtype), shape) for dtype, shape in self._shapes(split)],
            self.run.examples(split).digests(first).tolist(),
            f"{self.batches.device.type} {self.batches.cast} {self._most}",
        )
        return record_path(self._folder, split, parts)

    def _new_capture(
        self, split: str, columns: Sequence[str], note: Callable[[str], None]
    ) -> AnyCapture:
        definition, module = self.run.definition, self.run.model.module
        name = self.batches.quantity_name(split).removesuffix("()")
        measured = name == "measure"
        function = definition.raw(name)

        def quantity(model: torch.nn.Module, batch: Any) -> Any:  # the user's batch and tensor
            value = function(model, batch)
            return -value if measured and isinstance(value, torch.Tensor) else value

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

    def _share(self, key: tuple[str, Columns]) -> bool:
        """Take the other split's capture, if it is right for this one: they share loss(), their
        first examples have tensors of the same shapes, and have their losses in batches, too.
        """
        split, other = key[0], "query" if key[0] == "train" else "train"
        capture = self._captures.get((other, key[1]))
        if (
            capture is None
            or not self._are_alike(split)
            or not self._on_first(split, lambda batch, singles: self._in_order(split, capture))
        ):
            return False
        self._captures[key] = capture
        if (measured := self._measured.get((other, key[1]))) is not None:
            self._measured[key] = measured
        self._remember(key, self._records[other, key[1]])
        return True

    def _are_alike(self, split: str) -> bool:
        """Whether both splits have one quantity, and first examples with tensors of the same
        shapes.
        """
        other = "query" if split == "train" else "train"
        return self.batches.quantity_name(split) == self.batches.quantity_name(
            other
        ) and self._shapes(split) == self._shapes(other)

    def _first_two(self, split: str) -> np.ndarray:
        """The examples of a probe: the first, and the largest of some more, to whose size collate()
        pads a batch. A single row of the command line counts twice: it gets the bits that it has
        among other queries.
        """
        examples = self.run.examples(split)
        if examples.given is not None and len(examples) == 1:
            return np.zeros(2, np.int64)
        if len(examples) == 1:
            return np.zeros(1, np.int64)
        return np.array([0, self._largest(split)])

    def _largest(self, split: str) -> int:
        """Of the first examples behind example 0, the one with the most numbers; the first of
        several. Examples that collate() does not pad are all alike.
        """
        if split not in self._largest_examples:
            ids = np.arange(min(SIZE_SAMPLE, len(self.run.examples(split))))
            sizes = [0]
            if self.run.definition.has("collate"):
                _, single = self.batches.of(split, ids)
                sizes = [sum(map(torch.numel, leaves(single(int(i))))) for i in ids[1:]]
            self._largest_examples[split] = 1 + sizes.index(max(sizes))
        return self._largest_examples[split]

    def _shapes(self, split: str) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        first = self._first_two(split)
        batch, single = self.batches.of(split, first)
        tensors = [tensor for part in (batch, single(0)) for tensor in leaves(part)]
        return [(tensor.dtype, tuple(tensor.shape)) for tensor in tensors]

    def _on_first(self, split: str, check: Callable[[Batch, list[Batch]], Result]) -> Result:
        """check(batch, singles) on the two examples of a probe, with errors that name the user's
        function.
        """
        first = self._first_two(split)
        batch, single = self.batches.of(split, first)
        try:
            return check(batch, [single(i) for i in range(len(first))])
        except LossCountError as error:
            self.batches.refuse_dropped(split, first)
            self.batches.refuse_dropped(split, self._order_sample(split))
            raise error
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise self.batches.explained(split, error, len(first)) from error

    def _order_sample(self, split: str) -> np.ndarray:
        most = min(ORDER_SAMPLE, self._most or ORDER_SAMPLE)
        return np.arange(min(most, len(self.run.examples(split))))

    def _in_order(self, split: str, capture: AnyCapture) -> bool:
        """Whether examples have the same losses in a batch and alone. Raises GradientError where
        a batch has them in another order.
        """
        ids = self._order_sample(split)
        batch, single = self.batches.of(split, ids)

        def losses(examples: Batch, size: int) -> torch.Tensor:
            values = capture.quantity(self.run.model.module, examples)
            return checked(capture.name, values, size, traced=True).detach()

        with plain_attention(), torch.enable_grad():  # the loss may take gradients itself
            together = losses(batch, len(ids))
            alone = torch.cat([losses(single(i), 1) for i in range(len(ids))])
        check_loss_order(capture.name, together, alone)
        return close(together, alone)
