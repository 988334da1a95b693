"""What a user should know of the numbers of a run: refuses runs without gradients, notes doubts."""

import copy
from collections.abc import Sequence

import numpy as np
import torch

from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.errors import GradientError, listed
from influence_cli.extraction.row_counts import SMALL_LOSS, SMALL_NORM, VANISHING_LOSS, Key
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.autograd_gradients import gradients_by_autograd
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.tf32 import EPS as TF32_EPS
from influence_cli.gradients.tf32 import without_tf32
from influence_cli.run.checkpoints import Checkpoint

SAMPLE = 16  # other examples to look at, where all that were read are zero
ROUNDING_SAMPLE = 4  # gradients that are computed again in float32
COPY_BYTES = 1 << 30  # the largest float32 copy of a model that is made for it
HALVES = (torch.float16, torch.bfloat16)
USUAL_CAUSES = (
    "usual causes: cross-entropy of one logit (use binary_cross_entropy_with_logits), targets that "
    "are all ignored (-100), a loss that is constant or detached from the model, gradients too "
    "small for their number format"
)


def report_numbers(
    source: GradientSource, checkpoints: Sequence[Checkpoint], columns: Sequence[str]
) -> None:
    """Refuse a run whose losses or gradients are all zero; note zero queries, small losses and
    half precision. Call it after the rows were read.
    """
    for split in ("train", "query"):
        if any(key[0] == split for key in source.counts.read):
            refuse_zeros(source, split, checkpoints[0], columns)
    zero = [query for query, is_zero in source.counts.zero_queries.items() if is_zero]
    if zero:
        source.reporter.note(
            f"the gradient of query {listed(zero)} is 0 in the selected parameters, so all scores "
            "of it are 0"
        )
    note_small_numbers(source, checkpoints)
    note_coarse_precision(source, checkpoints[-1], columns)


def refuse_zeros(
    source: GradientSource, split: str, checkpoint: Checkpoint, columns: Sequence[str]
) -> None:
    """Raise GradientError where all rows that were read, and a sample of the others, are zero."""
    counts = source.counts
    if split in counts.any_loss and split in counts.any_gradient:
        return
    ids = np.array(spread_evenly(len(source.run.examples(split)), SAMPLE))
    rows = source.extractor.rows_at(checkpoint, split, columns, ids, "norms")
    gradients = split in counts.any_gradient or any(
        bool(norms.any()) for norms in rows.sqnorms.values()
    )
    losses = split in counts.any_loss or bool(rows.losses.any())
    if len(ids) > 1 and not (losses and gradients):
        raise zero_error(source, split, losses, gradients)


def zero_error(source: GradientSource, split: str, losses: bool, gradients: bool) -> GradientError:
    """`losses`, `gradients`: whether any is other than 0."""
    function = source.extractor.batches.quantity_name(split)
    wrong = [name for name, fine in ((f"{function}", losses), ("gradient", gradients)) if not fine]
    return GradientError(
        f"every {' and every '.join(wrong)} of {source.run.examples(split).source} is 0",
        "expected: losses that depend on the parameters whose gradients are compared",
        USUAL_CAUSES,
    )


def sample_train_rows(
    source: GradientSource, checkpoint: Checkpoint, columns: Sequence[str]
) -> None:
    """Count a sample of the training examples, where a method reads none of their gradients."""
    ids = np.array(spread_evenly(len(source.run.train), SAMPLE))
    rows = source.extractor.rows_at(checkpoint, "train", columns, ids, "norms")
    source.counts.add("train", checkpoint.step, columns, rows)


def note_small_numbers(source: GradientSource, checkpoints: Sequence[Checkpoint]) -> None:
    """Notes on losses and gradients that are too small for their number format."""
    counts, precision = source.counts, source.settings.precision
    for split, kind in (("train", "training examples"), ("query", "queries")):

        def worst(numbers: dict[Key, int], split: str = split) -> tuple[int, int, int]:
            """The count, of how many examples, and the step with the highest count."""
            keys = [(split, checkpoint.step) for checkpoint in checkpoints]
            key = max(keys, key=lambda key: numbers.get(key, 0))
            return numbers.get(key, 0), counts.read.get(key, 0), key[1]

        if precision == torch.float32:
            count, total, step = worst(counts.small)
            what = f"a loss below {SMALL_LOSS:g}"
            if not count or source.extractor.batches.quantity_name(split) != "loss()":
                count, total, step = worst(counts.small_norms)
                what = f"a gradient below {SMALL_NORM:g}"
            if count:
                source.reporter.note(
                    f"{count:,} of {total:,} {kind} have {what} at step {step}: their gradients "
                    "may have few right digits in float32; --precision float64 computes more "
                    "digits"
                )
        elif precision == torch.float64:
            count, total, step = worst(counts.vanished)
            if count:
                source.reporter.note(
                    f"{count:,} of {total:,} {kind} have a loss below {VANISHING_LOSS:g} at step "
                    f"{step}, and the square of their gradient is 0 in float64: their norms, "
                    "cosines and self-influence have few right digits"
                )


def note_rounded_features(source: GradientSource) -> None:
    precision = source.settings.precision
    if precision in HALVES:
        source.reporter.note(
            f"features are computed in {source.settings.precision_name}: each number is rounded by "
            f"up to {torch.finfo(precision).eps / 2:.1%}; --precision float32 avoids this"
        )


def note_coarse_precision(
    source: GradientSource, checkpoint: Checkpoint, columns: Sequence[str]
) -> None:
    if not is_coarse(source):
        return
    settings = source.settings
    eps = TF32_EPS if settings.tf32 else torch.finfo(settings.precision).eps
    error = measure_rounding(source, checkpoint, columns)
    effect = (
        f"each number is rounded by up to {eps / 2:.1%}"
        if error is None
        else f"a gradient differs from float32 by {error:.1%} of its norm "
        f"(mean of {ROUNDING_SAMPLE} training examples)"
    )
    source.reporter.note(
        f"gradients are computed in {settings.precision_name}: {effect}; "
        "--precision float32 avoids this"
    )


def is_coarse(source: GradientSource) -> bool:
    """Whether gradients are computed with fewer digits than float32 has."""
    return source.settings.tf32 or source.settings.precision in HALVES


def measure_rounding(
    source: GradientSource, checkpoint: Checkpoint, columns: Sequence[str]
) -> float | None:
    """The relative error of gradients in half precision or TF32 against float32, the mean over a
    few training examples. None where the model is too large to copy, or all gradients are zero.
    """
    model = source.run.model.at(checkpoint)
    if sum(value.numel() for value in model.parameters()) * 4 > COPY_BYTES:
        return None
    capture = source.extractor.captures.of("train", columns)
    if not isinstance(capture, Capture):
        return None
    wide, errors = copy.deepcopy(model).float(), []
    for index in spread_evenly(len(source.run.train), ROUNDING_SAMPLE):
        ids = np.array([index])
        batch, _ = source.extractor.batches.of("train", ids)
        wide_batch, _ = source.extractor.batches.of("train", ids, torch.float32)
        _, rounded = capture.single(batch)
        with without_tf32(source.settings.tf32):
            _, exact = gradients_by_autograd(
                wide, capture.quantity, capture.names, capture.name, wide_batch
            )
        squares = sum(float(grad.double().square().sum()) for grad in exact.values())
        differences = [
            float((rounded[key].double() - exact[key].double()).square().sum()) for key in exact
        ]
        if squares:
            errors.append((sum(differences) / squares) ** 0.5)
    return float(np.mean(errors)) if errors else None
