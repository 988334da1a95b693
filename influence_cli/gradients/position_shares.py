"""The shares of an example's positions in the products of its gradient with other gradients.

Letters: S positions, Q directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from influence_cli.errors import GradientError
from influence_cli.gradients.autograd_gradients import gradients_by_autograd
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.example_axes import AxisPlan
from influence_cli.gradients.forms import Dense
from influence_cli.gradients.position_hooks import Directions, PositionHooks


@dataclass(frozen=True)
class PositionShares:
    """`at` (S, Q) and `rest` (Q,), float64: their sum over positions is the product of the
    gradients. `rest`: what has no position; None where all has one. `ids` (S,): token ids, None
    where the model reads none. `padding` (S,): whether a position has the padding token of the
    embedding.
    """

    at: Tensor
    rest: Tensor | None
    ids: Tensor | None
    padding: Tensor


def position_shares(
    capture: Capture, example: Batch, directions: Directions, token_weight: Tensor | None
) -> PositionShares:
    """Of a batch of one. `token_weight`: see PositionHooks. Parameters that no layer rule computes
    have no positions.

    Raises GradientError where the model's layers read no positions.
    """

    def new_hooks(plan: AxisPlan, parameters: Mapping[str, nn.Parameter]) -> PositionHooks:
        return PositionHooks(plan, parameters, directions, token_weight)

    visited = capture.run_rules(example, 1, new_hooks)
    if visited is None or not visited[1].lengths:
        raise GradientError(
            "no layer of the model reads a sequence of positions",
            "expected: an embedding of token ids (B, S), or layers with an input (B, S, features)"
            if visited is not None
            else "found: layer rules compute none of its gradients",
            "--by layer splits a score over layers",
        )
    hooks = visited[1]
    if len(set(hooks.lengths)) < len(hooks.lengths):
        raise GradientError(
            f"an example has several sequences of {max(hooks.lengths)} tokens, and the layers do "
            "not tell which they read",
            "expected: sequences of several lengths, or one",
            "--by layer splits a score over layers",
        )
    rest = hooks.shares[-1]
    if capture.others:
        _, grads = gradients_by_autograd(
            capture.model, capture.quantity, capture.others, capture.name, example
        )
        for name, grad in grads.items():
            row = Dense(tuple(grad.shape), grad.reshape(1, -1))
            rest = rest + directions.products(name, row)[0].to(rest)
    has_rest = hooks.has_rest or bool(capture.others)
    return PositionShares(hooks.shares[:-1], rest if has_rest else None, hooks.ids, hooks.padding)
