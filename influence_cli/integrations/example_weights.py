"""Measures the factor of each example's loss in the loss that Trainer differentiates.

Trainer divides a micro-batch's loss by its examples, its label tokens, those of all micro-batches
of the step, or their number; which of them depends on the model's class and the arguments. Here it
is measured: the loss that Trainer differentiates, divided by the sum of the examples' losses, must
be one of these factors.

Letters: B examples, S positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import TrajectoryError
from influence_cli.integrations import hf_losses
from influence_cli.integrations.hf_task import CLASSIFICATION, KINDS, PROBLEMS, infer_problem
from influence_cli.integrations.run_folder import find_kind

TOLERANCE = 1e-3  # relative, of a measured factor
ROUNDING = 1e-5  # of the loss of one example or token, absolute
LossFunction = Callable[[Any, Any], Tensor]  # (outputs, labels) -> (B,)


@dataclass(frozen=True)
class MicroBatch:
    """What a forward pass returned, and what Trainer made of it.

    `loss`: the number that it differentiated. `items`: Trainer's num_items_in_batch; None: it
    counted none. `accumulated`: micro-batches of the step.
    """

    outputs: Any  # of the model
    labels: Any
    loss: float
    items: float | None
    accumulated: int


class ExampleWeights:
    """Finds the weights of a model's examples. `loss`: the definition's loss of each example, from
    the model's outputs and the labels; None: that of the model's class (huggingface.Task).

    Raises TrajectoryError for a class without such a loss.
    """

    def __init__(self, model: Any, loss: LossFunction | None, normalise: str | None) -> None:
        self.model, self.loss = model, loss
        config = model.config.to_dict() if hasattr(model, "config") else {}
        self.kind = find_kind(type(model).__name__, config) if loss is None else None
        if loss is None and self.kind is None:
            raise TrajectoryError(
                f"{type(model).__name__} has no known loss of an example",
                f"expected: a model for {', '.join(KINDS)}",
                "record(trainer, loss=FUNCTION): FUNCTION(outputs, labels) returns (B,), the loss "
                "of each example",
            )
        self.normalise = normalise
        self.rules: set[str] | None = None  # that agree with all micro-batches so far

    def measure(self, batch: MicroBatch, count: int) -> list[float]:
        """(B,) the weights of `count` examples. Raises TrajectoryError where no rule agrees."""
        losses_B, tokens_B = self._example_losses(batch)
        if losses_B.shape != (count,):
            raise TrajectoryError(
                f"the loss of each example has the shape {tuple(losses_B.shape)}",
                f"expected: ({count},), one per example of the micro-batch",
            )
        total = float(losses_B.double().sum())
        tokens = count if tokens_B is None else float(tokens_B.sum())
        factor = self._find_factor(batch, total, count, tokens)
        if tokens_B is None or (self.normalise or KINDS[self.kind or ""].normalise) == "token":
            return [factor] * count
        return [factor * float(number) for number in tokens_B]  # the loss is a mean over tokens

    def _example_losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor | None]:
        """(B,) losses, of tokens their sums; and (B,) label tokens, None where there are none."""
        with torch.no_grad():
            if self.loss is not None:
                return self.loss(batch.outputs, batch.labels), None
            assert self.kind is not None
            logits, labels = batch.outputs.logits.detach(), batch.labels
            if self.kind in CLASSIFICATION:
                config = self.model.config
                problem = config.problem_type or (
                    "regression" if config.num_labels == 1 else infer_problem(labels)
                )
                return PROBLEMS[problem](logits, labels, "example"), None
            counted = labels[:, 1:] if self.kind == "causal-lm" else labels
            losses_B = KINDS[self.kind].loss(logits, labels, "token")
            return losses_B, (counted != hf_losses.IGNORED).sum(1)

    def _find_factor(self, batch: MicroBatch, total: float, count: int, tokens: float) -> float:
        """The factor of the summed losses in the differentiated loss."""
        divisors = {
            "examples": float(count),
            "examples of all micro-batches": float(count * batch.accumulated),
            "tokens": tokens,
            "tokens of all micro-batches": tokens * batch.accumulated,
            "items": batch.items or 0.0,
        }
        allowed = TOLERANCE * abs(total) + ROUNDING * max(tokens, count)
        agreeing = {
            name
            for name, divisor in divisors.items()
            if divisor and abs(batch.loss * divisor - total) <= allowed
        }
        agreeing &= self.rules if self.rules is not None else agreeing
        if agreeing:
            self.rules = agreeing
            return 1 / divisors[min(agreeing)]
        if self.loss is not None and total:
            return batch.loss / total
        raise TrajectoryError(
            "Trainer does not train on a sum of the examples' losses with equal weights",
            f"found: a loss of {batch.loss:.6g}, and losses of {count} examples with the sum "
            f"{total:.6g}",
            f"expected: their mean, or their sum divided by "
            f"{', '.join(f'{number:g}' for number in sorted(set(divisors.values())) if number)}",
            "possible causes: label smoothing, class weights, a compute_loss of your own",
            "record(trainer, loss=FUNCTION): FUNCTION(outputs, labels) returns (B,), the loss of "
            "each example, as definition.py defines it",
        )
