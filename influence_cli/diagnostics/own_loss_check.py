"""Compares the definition's loss with the loss that the model itself computes, where it does.

Models of transformers return `.loss` if they get labels; a Lightning module returns the loss of
training_step(). Both are taken of one example, as the dataset gives it, without padding.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
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


def compare_losses(
    source: GradientSource, model: Any, split: str, sample: Sequence[int]
) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any], float, float]]:
    """(example's number, example, batch of one, the definition's loss, the model's own loss)."""
    examples, definition = source.run.examples(split), source.run.definition
    batches = source.extractor.batches
    for index in sample:
        item = examples.item(index)
        if not isinstance(item, Mapping) or not hasattr(model, "config"):
            return
        inputs = own_inputs(model, item)
        if inputs is None:
            return
        batch, _ = batches.of(split, np.array([index]))
        with torch.no_grad():
            value = definition.call("loss", source.run.model.module, batch)
            own = model(**move_batch(inputs, batches.device, batches.cast)).loss
        predicts_nothing = own is not None and own.isnan() and not value.any()
        if own is not None and value.numel() == 1 and not predicts_nothing:
            yield int(index), inputs, batch, float(value), float(own)


def own_inputs(model: Any, example: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The arguments of the model's forward for one example; None where it gets no labels."""
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


def describe_worst(
    model: Any, split: str, pairs: list[tuple[int, Mapping[str, Any], Any, float, float]]
) -> Finding:
    """The worst of these examples, with the cause. The definition may sum over tokens where the
    model takes the mean.
    """
    by_rule: dict[str, list[float]] = {}
    for _, inputs, _, value, own in pairs:
        for rule, factor in list_factors(inputs["labels"]).items():
            error = abs(value - own * factor) / max(abs(own * factor), TINY)
            by_rule.setdefault(rule, []).append(error)
    complete = {rule: errors for rule, errors in by_rule.items() if len(errors) == len(pairs)}
    rule = min(complete, key=lambda name: max(complete[name]))
    worst = max(range(len(pairs)), key=lambda number: complete[rule][number])
    error, (index, inputs, batch, value, own) = complete[rule][worst], pairs[worst]
    if math.isnan(error) or error > ALLOWED:
        note = f"example {index}: {value:.6g}, the model's own .loss {own:.6g}; "
        return Finding(
            "loss", split, "loss()", error, ALLOWED, note + find_cause(model, inputs, batch)
        )
    return Finding("loss", split, "loss()", error, ALLOWED, rule)


def list_factors(labels: Tensor) -> dict[str, int]:
    """What the definition's loss may be in terms of the model's own one -> its factor."""
    factors = {"the model's own .loss": 1}
    if labels.dim() > 1 and not labels.is_floating_point():
        factors["the model's own .loss x label tokens"] = int((labels != IGNORED).sum())
        shifted = int((labels[:, 1:] != IGNORED).sum())
        factors["the model's own .loss x predicted tokens"] = shifted
    return factors


def find_cause(model: Any, inputs: Mapping[str, Tensor], batch: Any) -> str:
    """Why the two losses may differ."""
    present = batch if isinstance(batch, Mapping) else {}
    missing = [name for name in inputs if name != "labels" and name not in present]
    if missing and present:
        return f"collate() drops {', '.join(missing)}, which the model's forward takes"
    if getattr(model.config, "output_router_logits", False):
        return "the model adds a loss of its router (output_router_logits)"
    if getattr(model.config, "problem_type", None):
        return f"config.json has problem_type {model.config.problem_type}"
    return "the definition computes another loss than the model"
