"""Compares the definition's loss with the loss that the model itself computes, where it does.

Models of transformers return `.loss` if they get labels; a Lightning module returns the loss of
training_step(). Both are taken of one example, as the dataset gives it, without padding.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.diagnostics.finding import EXAMPLES, Finding
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.batches import to as move_batch
from influence_cli.run.checkpoints import Checkpoint

ALLOWED = 1e-4  # padding changes the order of sums
INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_values", "input_features")
LABELS = ("labels", "label", "label_ids")
IGNORED = -100
TINY = 1e-30


def check_own_loss(
    source: GradientSource, checkpoints: Sequence[Checkpoint], ids: Mapping[str, Ids]
) -> list[Finding]:
    """One finding for each split whose examples the model's own loss takes; at the last
    checkpoint.
    """
    model: Any = source.run.model.at(checkpoints[-1])
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    findings = []
    for split, split_ids in ids.items():
        sample = [split_ids[i] for i in spread_evenly(len(split_ids), EXAMPLES)]
        pairs = list(compare_losses(source, inner, split, sample))
        if pairs:
            findings.append(describe_worst(inner, split, pairs))
    return findings


@dataclass(frozen=True)
class LossPair:
    """Two losses of one example: the definition's `value`, and the model's `own`. `inputs`: what
    the model got. `batch`: what the definition got.
    """

    example: int
    inputs: Mapping[str, Tensor]
    batch: Any
    value: float
    own: float


def compare_losses(
    source: GradientSource, model: Any, split: str, sample: Sequence[int]
) -> Iterator[LossPair]:
    """Nothing where the model has no loss of its own for these examples."""
    for index in sample:
        batch, _ = source.extractor.batches.of(split, np.array([index]))
        if hasattr(model, "training_step"):
            inputs: dict[str, Tensor] | None = {}
        else:
            inputs = own_inputs(model, source.run.examples(split).item(index))
        if inputs is None:
            return
        with torch.no_grad():
            value = source.run.definition.call("loss", source.run.model.module, batch)
            own = own_loss(source, model, batch, inputs)
        predicts_nothing = own is not None and own.isnan() and not value.any()
        if own is None:
            return
        if own.numel() == value.numel() == 1 and not predicts_nothing:
            yield LossPair(int(index), inputs, batch, float(value), float(own))


def own_loss(
    source: GradientSource, model: Any, batch: Any, inputs: dict[str, Tensor]
) -> Tensor | None:
    """None where the model can't compute it: it needs a trainer, or other arguments."""
    batches = source.extractor.batches
    try:
        if hasattr(model, "training_step"):
            result = model.training_step(batch, 0)
        else:
            result = model(**move_batch(inputs, batches.device, batches.cast))
    except Exception as error:  # the user's model, called in a way that the user did not choose
        source.reporter.note(
            "check did not compare the loss with the model's own: that raised "
            f"{type(error).__name__}: {error}"
        )
        return None
    loss = result.get("loss") if isinstance(result, Mapping) else result
    return loss if isinstance(loss, Tensor) else None


def own_inputs(model: Any, example: Any) -> dict[str, Tensor] | None:
    """The arguments of the model's forward for one example; None for what is no model of
    transformers, or an example that is no dict with inputs and labels.
    """
    if not isinstance(example, Mapping) or not hasattr(model, "config"):
        return None
    accepted = inspect.signature(model.forward).parameters
    names = {name: "labels" if name in LABELS else name for name in example}
    inputs = {
        argument: value
        for name, argument in names.items()
        if argument in accepted and (value := as_batch(example[name])) is not None
    }
    has_input = any(name in inputs for name in INPUTS)
    return inputs if has_input and "labels" in inputs else None


def as_batch(value: Any) -> Tensor | None:  # Any: a part of the user's example
    try:
        return torch.as_tensor(value)[None]
    except (TypeError, ValueError, RuntimeError):
        return None


def describe_worst(model: Any, split: str, pairs: list[LossPair]) -> Finding:
    """The worst of these examples, with the cause. The definition may sum over tokens where the
    model takes the mean.
    """
    by_rule: dict[str, list[float]] = {}
    for pair in pairs:
        for rule, factor in list_factors(pair.inputs.get("labels")).items():
            expected = pair.own * factor
            error = abs(pair.value - expected) / max(abs(expected), TINY)
            by_rule.setdefault(rule, []).append(error)
    complete = {rule: errors for rule, errors in by_rule.items() if len(errors) == len(pairs)}
    rule = min(complete, key=lambda name: max(complete[name]))
    errors = complete[rule]
    worst = max(range(len(pairs)), key=lambda number: errors[number])
    note, pair = rule, pairs[worst]
    if not errors[worst] <= ALLOWED:  # also for nan
        note = f"example {pair.example}: {pair.value:.6g}, {next(iter(complete))} {pair.own:.6g}; "
        note += find_cause(model, pair)
    return Finding("loss", split, "loss()", errors[worst], ALLOWED, note)


def list_factors(labels: Tensor | None) -> dict[str, int]:
    """What the definition's loss may be in terms of the model's own one -> its factor."""
    if labels is None:
        return {"training_step() of the example alone": 1}
    factors = {"the model's own .loss": 1}
    if labels.dim() > 1 and not labels.is_floating_point():
        factors["the model's own .loss x label tokens"] = int((labels != IGNORED).sum())
        shifted = int((labels[:, 1:] != IGNORED).sum())
        factors["the model's own .loss x predicted tokens"] = shifted
    return factors


def find_cause(model: Any, pair: LossPair) -> str:
    """Why the two losses may differ."""
    present = pair.batch if isinstance(pair.batch, Mapping) else {}
    missing = [name for name in pair.inputs if name != "labels" and name not in present]
    if missing and present:
        return f"collate() drops {', '.join(missing)}, which the model's forward takes"
    if getattr(getattr(model, "config", None), "output_router_logits", False):
        return "the model adds a loss of its router (output_router_logits)"
    return "the definition computes another loss than the model"
