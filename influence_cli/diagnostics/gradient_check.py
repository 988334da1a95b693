"""Checks the gradients on the user's own model and data.

Each check compares the fast path with something independent of it:

gradients  with plain autograd, one example at a time
batches    with the same examples in another order, and alone: an example's gradient must not
           depend on the rest of its batch
repeats    with the same batch again
coverage   the sum over the examples, with one backward pass of the summed loss through the model
precision  gradients in half precision or TF32 with those in float32
outputs    loss_from_outputs(outputs(...)), if the definition has them, with loss(...)
zeros      fails where all losses or all gradients are 0

B is the number of examples, D the number of gradient values of a parameter.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.diagnostics.finding import CHECKPOINTS, EXAMPLES, Finding
from influence_cli.extraction.number_checks import check_finite
from influence_cli.extraction.run_notes import (
    ROUNDING_SAMPLE,
    USUAL_CAUSES,
    is_coarse,
    measure_rounding,
)
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.capture import Capture, Captured
from influence_cli.gradients.forms import Form
from influence_cli.gradients.tolerances import rounding
from influence_cli.run.checkpoints import Checkpoint

ORDER = ("zeros", "gradients", "batches", "repeats", "coverage", "outputs")
DENSE_BYTES = 2 << 30  # dense gradients in memory; at least those of two examples
DENSE_COPIES = 6  # of the dense gradients that the checks compare
MOST_ROUNDING = 0.5  # of a gradient's norm; well-fit examples in bfloat16 have 0.2 to 0.3
TINY = 1e-30  # a divisor that is not zero

LossesAndGrads = tuple[Tensor, Mapping[str, Tensor]]  # (B,), and (B, D) of each parameter


def check_gradients(
    source: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
) -> list[Finding]:
    """All checks of some checkpoints and some examples of each split: the worst finding of each
    check and subject.
    """
    worst: dict[tuple[str, str, str], Finding] = {}
    exact = source.exact()
    nonzero: dict[str, set[str]] = {split: set() for split in ids}
    selected = [checkpoints[i] for i in spread_evenly(len(checkpoints), CHECKPOINTS)]
    examples = select_examples(exact, columns, ids)
    total = len(selected) * sum(map(len, examples.values()))
    with source.reporter.progress("checking gradients", total) as advance:
        for checkpoint in selected:
            exact.run.model.at(checkpoint)
            for split, split_ids in examples.items():
                batch_check = BatchCheck(exact, checkpoint, split, columns, split_ids)
                nonzero[split] |= batch_check.nonzero()
                for finding in batch_check.findings():
                    key = finding.check, finding.split, finding.subject
                    if key not in worst or not finding.error <= worst[key].error:
                        worst[key] = finding
                advance(len(split_ids))
    for split, split_ids in examples.items():
        if len(split_ids) > 1:  # one example may well have no gradient
            for name in sorted({"every loss", "every gradient"} - nonzero[split]):
                finding = Finding("zeros", split, name, math.inf, 0.0, f"0; {USUAL_CAUSES}")
                worst["zeros", split, name] = finding
    return sorted(worst.values(), key=lambda finding: ORDER.index(finding.check))


def check_precision(
    source: GradientSource, checkpoints: Sequence[Checkpoint], columns: Sequence[str]
) -> list[Finding]:
    """The rounding error of gradients in half precision or TF32, at the last checkpoint. Nothing
    for other precisions.
    """
    if not is_coarse(source):
        return []
    error = measure_rounding(source, checkpoints[-1], columns)
    if error is None:
        return []
    name = source.settings.precision_name
    note = f"{name} against float32, {checkpoints[-1].name}, mean of {ROUNDING_SAMPLE} examples"
    return [Finding("precision", "train", "all parameters", error, MOST_ROUNDING, note)]


def select_examples(
    source: GradientSource, columns: Sequence[str], ids: Mapping[str, Ids]
) -> dict[str, np.ndarray]:
    """At most EXAMPLES ids of each split, fewer for a large model."""
    parameters = [source.run.columns[name] for name in columns]
    example_bytes = sum(column.numel * column.dtype.itemsize for column in parameters)
    most = min(EXAMPLES, max(2, DENSE_BYTES // (DENSE_COPIES * example_bytes)))
    return {
        split: np.array([split_ids[i] for i in spread_evenly(len(split_ids), most)])
        for split, split_ids in ids.items()
    }


@dataclass(frozen=True)
class ErrorScales:
    """What errors of a parameter are relative to: its largest gradient norm.

    If that is rounding error itself: a small part of the norm of the whole gradient.
    """

    largest: dict[str, float]
    least: float

    @classmethod
    def of(cls, grads: Mapping[str, Tensor]) -> "ErrorScales":
        norms = {name: grad_BD.double().norm(dim=1) for name, grad_BD in grads.items()}
        squares = sum((norm_B.square() for norm_B in norms.values()), torch.zeros(()))
        dtype = next(iter(grads.values())).dtype
        return cls(
            {name: float(norm_B.max()) for name, norm_B in norms.items()},
            torch.finfo(dtype).eps ** 0.75 / rounding(dtype) * float(squares.max().sqrt()),
        )

    def scale(self, name: str) -> float:
        return max(self.largest[name], self.least, TINY)


class BatchCheck:
    """Checks the gradients of one batch of examples at one checkpoint."""

    def __init__(
        self,
        source: GradientSource,
        checkpoint: Checkpoint,
        split: str,
        columns: Sequence[str],
        ids: np.ndarray,
    ) -> None:
        """Computes the gradients once by plain autograd and once by the fast path.

        Raises GradientError where a loss or a gradient is not finite.
        """
        capture = source.extractor.captures.of(split, columns)
        assert isinstance(capture, Capture)
        self.source, self.checkpoint, self.split = source, checkpoint, split
        self.columns, self.ids, self.capture = columns, ids, capture
        self.batch, self.single = source.extractor.batches.of(split, ids)
        references = [capture.single(self.single(i)) for i in range(len(ids))]
        self.losses = torch.cat([loss for loss, _ in references]).double().cpu()
        self.grads = {
            name: torch.stack([grads[name] for _, grads in references]).flatten(1)
            for name in columns
        }
        sqnorms = {name: grads.double().square().sum(1) for name, grads in self.grads.items()}
        data = source.run.examples(split).source
        check_finite(checkpoint.name, data, ids, self.losses, sqnorms)
        self.fast = losses_and_grads(capture(self.batch, self.single, len(ids)))
        self.scales = ErrorScales.of(self.grads)

    def nonzero(self) -> set[str]:
        """What is not zero at all examples: "every loss", "every gradient"."""
        gradients = any(bool(grad_BD.any()) for grad_BD in self.grads.values())
        pairs = (("every loss", bool(self.losses.any())), ("every gradient", gradients))
        return {name for name, any_nonzero in pairs if any_nonzero}

    def findings(self) -> Iterator[Finding]:
        yield from self.compare(
            "gradients", self.fast, (self.losses, self.grads), self.describe_capture
        )
        yield from self.check_batches()
        yield from self.check_repeats()
        yield from self.check_coverage()
        yield from self.check_outputs()

    def compare(
        self,
        check: str,
        computed: LossesAndGrads,
        expected: LossesAndGrads,
        describe: Callable[[str], str] = lambda name: "",
    ) -> Iterator[Finding]:
        """The worst error of the losses and of each parameter."""
        errors_B = (computed[0] - expected[0]).abs() / self.losses.abs().max().clamp(min=TINY)
        allowed = rounding(self.grads[self.columns[0]].dtype)
        error, place = float(errors_B.max()), self.describe_worst(errors_B)
        yield Finding(check, self.split, "the loss", error, allowed, place)
        for name in self.columns:
            difference_BD = (computed[1][name] - expected[1][name]).double()
            errors_B = difference_BD.norm(dim=1).cpu() / self.scales.scale(name)
            error, allowed = float(errors_B.max()), rounding(self.grads[name].dtype)
            notes = describe(name), self.describe_worst(errors_B)
            yield Finding(check, self.split, name, error, allowed, "; ".join(filter(None, notes)))

    def describe_worst(self, errors_B: Tensor) -> str:
        """The example with the worst error; empty if that is only rounding error."""
        worst = int(errors_B.argmax())  # a nan counts as the largest
        if errors_B[worst] <= rounding(torch.float32):
            return ""
        return f"example {self.ids[worst]}, {self.checkpoint.name}"

    def describe_capture(self, name: str) -> str:
        """How the fast path computes the gradients of a parameter."""
        if not self.capture.at_once:
            way = "one example at a time"
        elif name in self.capture.hooked:
            way = "by its rule"
        else:
            way = f"by torch.func: {self.capture.why_not_hooked.get(name, 'no rule')}"
        return way if self.grads[name].any() else f"{way}; zero at all of these examples"

    def check_batches(self) -> Iterator[Finding]:
        """All examples in reverse order, then the first one alone."""
        size = len(self.ids)
        for order in (np.arange(size)[::-1].copy(), np.arange(1)):
            batch, single = self.source.extractor.batches.of(self.split, self.ids[order])
            captured = self.capture(batch, single, len(order))
            yield from self.compare("batches", replace_rows(self.fast, order, captured), self.fast)

    def check_repeats(self) -> Iterator[Finding]:
        repeated = losses_and_grads(self.capture(self.batch, self.single, len(self.ids)))
        same = all(torch.equal(grad, self.fast[1][name]) for name, grad in repeated[1].items())
        note = "the same bits" if same else "other bits"
        yield from self.compare("repeats", repeated, self.fast, lambda name: note)

    def check_coverage(self) -> Iterator[Finding]:
        """Compares every trained parameter of the model, selected or not."""
        model, size = self.source.run.model.module, len(self.ids)
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        losses = self.capture.quantity(model, self.batch)
        grads = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        for (name, parameter), grad in zip(trained.items(), grads, strict=True):
            allowed = rounding(parameter.dtype)
            if name not in self.source.run.columns:
                note = "trained, but influence computes no gradients of it"
                yield Finding("coverage", self.split, name, math.inf, allowed, note)
            elif name in self.fast[1]:
                expected = torch.zeros_like(parameter) if grad is None else grad
                expected = expected.to_dense() if expected.is_sparse else expected
                sum_D = self.fast[1][name].double().sum(0)
                difference = (sum_D - expected.double().flatten()).norm()
                error = float(difference / (size * self.scales.scale(name)))
                yield Finding("coverage", self.split, name, error, allowed)

    def check_outputs(self) -> Iterator[Finding]:
        definition, subject = self.source.run.definition, "loss_from_outputs()"
        if not (definition.has("outputs") and definition.has("loss_from_outputs")):
            return
        if self.split == "query" and definition.has("measure"):
            return  # the losses are those of measure()
        with torch.no_grad():
            outputs = definition.call("outputs", self.source.run.model.module, self.batch)
            values = definition.call("loss_from_outputs", outputs, self.batch)
        if not isinstance(values, Tensor) or values.shape != self.losses.shape:
            shape = tuple(getattr(values, "shape", ()))
            note = f"shape {shape}, expected {tuple(self.losses.shape)}"
            yield Finding("outputs", self.split, subject, math.inf, 0.0, note)
            return
        difference = (values.double().cpu() - self.losses).abs().max()
        error = float(difference / self.losses.abs().max().clamp(min=TINY))
        yield Finding("outputs", self.split, subject, error, rounding(values.dtype))


def losses_and_grads(captured: Captured) -> LossesAndGrads:
    return captured.losses, dense_grads(captured.forms)


def dense_grads(forms: Mapping[str, Form]) -> dict[str, Tensor]:
    return {name: form.dense().values for name, form in forms.items()}


def replace_rows(
    original: LossesAndGrads, positions: np.ndarray, captured: Captured
) -> LossesAndGrads:
    """The original losses and gradients, with the captured ones at these positions."""
    losses = original[0].clone()
    losses[positions] = captured.losses
    grads = {name: grad_BD.clone() for name, grad_BD in original[1].items()}
    for name, grad_BD in dense_grads(captured.forms).items():
        grads[name][positions] = grad_BD
    return losses, grads
