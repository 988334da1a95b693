"""The gradients of some examples, taken now: checkpoints loaded, batches made, captures settled, what goes wrong there explained."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from influence_cli.cache.identity import Settings
from influence_cli.cache.store import GradientRows, Level
from influence_cli.errors import GradientError, InfluenceError, is_out_of_memory, listed
from influence_cli.gradients.batches import to
from influence_cli.gradients.buffers import FormBuffer
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.progress import Reporter
from influence_cli.run import Checkpoint, Run
from influence_cli.run import checkpoints as checkpoint_files
from influence_cli.run.definition import failure

AnyCapture = Capture | EmbeddingCapture


class GradientExtractor:
    """A run's model on its device, with the parameters of one checkpoint at a time. `cast`: what floating batch tensors are cast to."""

    def __init__(
        self,
        run: Run,
        settings: Settings,
        device: torch.device,
        cast: torch.dtype | None,
        reporter: Reporter,
    ) -> None:
        self.run, self.settings, self.device, self.cast, self.reporter = (
            run,
            settings,
            device,
            cast,
            reporter,
        )
        self._loaded: Checkpoint | None = None
        self._captures: dict[tuple[str, tuple[str, ...]], AnyCapture] = {}

    def take(
        self,
        split: str,
        checkpoint: Checkpoint,
        columns: Sequence[str],
        ids: np.ndarray,
        size: int,
        level: Level,
        digests_too: bool,
        advance: Callable[[int], None],
    ) -> GradientRows:
        """Gradients of these examples with the parameters that the model has, in batches of `size`; zeros for digests nobody keeps."""
        capture = self.capture_of(split, columns)
        losses, digests = [], []
        sqnorms: dict[str, list[torch.Tensor]] = {name: [] for name in columns}
        forms = FormBuffer(len(ids))
        for first in range(0, len(ids), size):
            chosen = ids[first : first + size]
            batch, single = self.batch(split, chosen)
            try:
                captured = capture(batch, single, len(chosen), level == "values")
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                raise self.explained(split, error, len(chosen)) from error
            losses.append(captured.losses)
            for name in columns:
                sqnorms[name].append(captured.sqnorms[name])
            if level == "values":
                forms.add(captured.forms)
            digests.append(
                self.run.examples(split).digests(chosen)
                if digests_too
                else torch.zeros(len(chosen), dtype=torch.int64)
            )
            if self.device.type == "cpu":  # a device is not waited for at each batch
                self._check_finite(
                    checkpoint,
                    split,
                    chosen,
                    losses[-1],
                    {name: values[-1] for name, values in sqnorms.items()},
                )
            advance(len(chosen))
        all_losses, all_norms = (
            torch.cat(losses).cpu(),
            {name: torch.cat(values).cpu() for name, values in sqnorms.items()},
        )
        if self.device.type != "cpu":
            self._check_finite(checkpoint, split, ids, all_losses, all_norms)
        return GradientRows(
            ids,
            all_losses,
            torch.cat(digests),
            all_norms,
            {
                name: Postings.of(form)
                if name in self.run.embeddings and isinstance(form, EmbeddingRows)
                else form
                for name, form in forms.done().items()
            },
        )

    def batch(
        self, split: str, ids: np.ndarray, cast: torch.dtype | None = None
    ) -> tuple[Any, Callable[[int], Any]]:
        """A batch on the device, and a function that gives its examples as batches of one. `cast`: in place of the run's precision."""
        examples = self.run.examples(split)

        def single(i: int) -> Any:
            return to(examples.batch(ids[i : i + 1]), self.device, cast or self.cast)

        try:
            return to(examples.batch(ids), self.device, cast or self.cast), single
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            raise self.explained(split, error, len(ids)) from error

    def load(self, checkpoint: Checkpoint) -> None:
        if self._loaded != checkpoint:
            self._loaded = None
            checkpoint_files.load(checkpoint, self.run.model)
            self._loaded = checkpoint

    def moved(self) -> None:
        """Someone else put other parameters into the model."""
        self._loaded = None

    def capture_of(self, split: str, columns: Sequence[str]) -> AnyCapture:
        key = (split, tuple(columns))
        if key not in self._captures:
            definition, examples = self.run.definition, self.run.examples(split)
            measured = split == "query" and definition.has("measure")
            name, function = (
                ("measure()", definition.raw("measure"))
                if measured
                else ("loss()", definition.raw("loss"))
            )

            def quantity(model: torch.nn.Module, batch: Any) -> Any:
                value = function(model, batch)
                return -value if measured and isinstance(value, torch.Tensor) else value

            words = (
                self.run.embeddings.get(columns[0])
                if len(columns) == 1 and columns[0] not in self.run.columns
                else None
            )
            if words is not None and words.module is not None:
                capture: AnyCapture = EmbeddingCapture(
                    self.run.model, quantity, words.name, words.module, name, self.reporter.note
                )
            else:
                embeddings = [column for column in columns if self.run.columns[column].embedding]
                capture = Capture(
                    self.run.model,
                    quantity,
                    columns,
                    embeddings,
                    name,
                    self.reporter.note,
                    self.settings.projection,
                )
            first = range(min(2, len(examples)))
            examples.check_stable(range(min(4, len(examples))))
            batch, single = self.batch(split, np.array(first))
            try:
                capture.probe(batch, [single(i) for i in first])
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                raise self.explained(split, error, len(first)) from error
            self._captures[key] = capture
        return self._captures[key]

    def explained(self, split: str, error: Exception | SystemExit, size: int) -> InfluenceError:
        """What an exception of the user's quantity becomes, in a batch of so many examples."""
        text = str(error)
        if is_out_of_memory(error):
            return GradientError(
                f"out of memory while taking the gradients of a batch of {size}",
                text.splitlines()[0] if text else type(error).__name__,
                "--batch-size N takes fewer at once, --layers GLOB fewer parameters; finished units are kept",
            )
        measured = split == "query" and self.run.definition.has("measure")
        return failure(self.run.definition, "measure" if measured else "loss", error)

    def _check_finite(
        self,
        checkpoint: Checkpoint,
        split: str,
        ids: np.ndarray,
        losses: torch.Tensor,
        sqnorms: dict[str, torch.Tensor],
    ) -> None:
        for name, values in [
            ("the loss", losses),
            *((f"the gradient of {column}", norms) for column, norms in sqnorms.items()),
        ]:
            wrong = ids[~torch.isfinite(values).numpy()]
            if len(wrong):
                raise GradientError(
                    f"{name} is not finite at {checkpoint.name}, example {wrong[0]} of {split}_data()",
                    f"{len(wrong)} of the {len(ids)} examples of its batch: {listed(wrong)}",
                    "look at that example and the loss; --precision float64 helps against overflow; --steps or --train leaves it out",
                )
