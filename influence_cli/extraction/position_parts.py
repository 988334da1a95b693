"""The parts of products of gradients by the positions of an example, or by its measured tokens.

Letters: S positions, Q directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import DefinitionError, GradientError, InfluenceError
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.gradients.batches import leaves
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.double_backward import twice_differentiable
from influence_cli.gradients.position_hooks import Directions
from influence_cli.gradients.position_shares import position_shares
from influence_cli.gradients.tolerances import rounding
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import Run


@dataclass(frozen=True)
class PositionParts:
    """(S, Q) float64 parts of some positions, whose numbers are `positions` (S,); `ids`: their
    token ids, where they are known. `rest` (Q,): what has no position; None where all has one.
    """

    positions: list[int]
    ids: list[int] | None
    parts: np.ndarray
    rest: np.ndarray | None


def train_position_parts(
    extractor: GradientExtractor,
    checkpoint: Checkpoint,
    columns: Sequence[str],
    id: int,
    directions: Directions,
) -> PositionParts:
    """Of a training example's gradient. The share of padding, if it has one, is in `rest`.

    Raises GradientError where the model's layers read no positions.
    """
    run = extractor.run
    model = run.model.at(checkpoint)
    token_name = run.token_embedding
    token_weight = None
    if token_name is not None:
        weight = model.get_submodule(token_name).weight
        token_weight = weight if isinstance(weight, Tensor) else None
    capture = extractor.captures.of("train", columns)
    assert isinstance(capture, Capture)
    plain = read_example(extractor, "train", id)
    example = unlike_lengths(model, plain)
    try:
        shares = position_shares(capture, example, directions, token_weight)
    except InfluenceError:
        raise
    except (Exception, SystemExit) as error:
        raise extractor.batches.explained("train", error, 1) from error
    hidden = shares.padding | padding_of(example, len(shares.padding))
    hidden[-1] |= example is not plain  # the position that was added
    return visible_parts(shares.at, shares.rest, shares.ids, hidden)


def query_token_parts(
    extractor: GradientExtractor,
    checkpoint: Checkpoint,
    columns: Sequence[str],
    id: int,
    directions: Sequence[Mapping[str, Tensor]],
) -> PositionParts:
    """Of a query's gradient, by the tokens of measure_tokens(): the inner products of the gradient
    of minus each token's measure with the directions.

    One backward pass gives the derivatives of all tokens along a direction: the gradient is linear
    in the tokens' weights. Raises DefinitionError where measure_tokens() does not return one
    differentiable number per token, or numbers whose sum is not the measure.
    """
    model = extractor.run.model.at(checkpoint)
    example = read_example(extractor, "query", id)
    capture = extractor.captures.of("query", columns)
    definition = extractor.run.definition
    parameters = {name: value for name, value in model.named_parameters() if name in set(columns)}
    with twice_differentiable(model, columns):
        values_S = checked_measures(definition.call("measure_tokens", model, example))
        quantity = capture.quantity(model, example)
        check_sum(values_S, -quantity.detach().sum(), id, extractor.batches.quantity_name("query"))
        try:
            parts_SQ = changes_along(values_S, parameters, directions)
        except RuntimeError as error:
            raise without_second_derivative(error) from error
    ids = ids_of_measures(model, example, len(values_S))
    hidden = padding_of(example, len(values_S))
    if ids is not None:
        hidden |= (ids == padding_token(extractor.run)) | (ids < 0)  # -100: no label
    return visible_parts(-parts_SQ, None, ids, hidden)


def visible_parts(
    parts_SQ: Tensor, rest_Q: Tensor | None, ids: Tensor | None, hidden: Tensor
) -> PositionParts:
    """`hidden` (S,): mask of padding, whose parts are added to the rest where they are not 0."""
    hidden_Q = parts_SQ[hidden].sum(0)
    if bool(hidden_Q.any()):
        rest_Q = hidden_Q if rest_Q is None else rest_Q + hidden_Q
    visible = (~hidden).nonzero().flatten()
    return PositionParts(
        visible.tolist(),
        None if ids is None else ids[visible].tolist(),
        parts_SQ[visible].numpy(),
        None if rest_Q is None else rest_Q.numpy(),
    )


def padding_token(run: Run) -> int | None:
    """The padding_idx of the embedding of tokens: the one that the model names, or the first."""
    name = run.token_embedding
    modules = [column.module for column in run.embeddings.values()]
    if name is None and modules:
        name = modules[0]
    if name is None:
        return None
    padding = getattr(run.model.module.get_submodule(name), "padding_idx", None)
    return padding if isinstance(padding, int) else None


def changes_along(
    values_S: Tensor, parameters: Mapping[str, Tensor], directions: Sequence[Mapping[str, Tensor]]
) -> Tensor:
    """(S, Q) float64: the derivative of each value along each direction. The gradient of their
    weighted sum is linear in the weights; its derivative gives all values' changes at once.
    """
    weights_S = torch.zeros_like(values_S, requires_grad=True)
    grads = torch.autograd.grad(
        values_S, list(parameters.values()), weights_S, create_graph=True, allow_unused=True
    )
    changes_SQ = torch.zeros(len(values_S), len(directions), dtype=torch.float64)
    for q, direction in enumerate(directions):
        total = weights_S.new_zeros(())
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total = total + (grad * direction[name].view_as(grad).to(grad)).sum()
        if total.requires_grad:
            (changes_S,) = torch.autograd.grad(total, weights_S, retain_graph=True)
            changes_SQ[:, q] = changes_S.cpu().double()
    return changes_SQ


def without_second_derivative(error: RuntimeError) -> Exception:
    """A GradientError if torch lacks a second derivative, else the error itself."""
    if "is not implemented" not in str(error):
        return error
    return GradientError(
        "--by query-token needs a second derivative that torch does not have: "
        + str(error).splitlines()[0],
        "expected: layers and measures whose backward pass is differentiable",
        "--by token splits the score over the training example",
    )


def read_example(extractor: GradientExtractor, split: str, id: int) -> Any:  # the user's batch
    """A batch of one."""
    return extractor.batches.of(split, np.array([id]))[0]


def unlike_lengths(model: Any, example: Any) -> Any:  # Any: the user's model and batch
    """The batch, for an encoder and decoder that read texts of one length with one more label that
    counts as none: layers then tell the texts apart by their lengths.
    """
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not decodes or not isinstance(example, Mapping):
        return example
    ids, labels = example.get("input_ids"), example.get("labels")
    if ids is None or labels is None or ids.shape != labels.shape:
        return example
    return {**example, "labels": torch.nn.functional.pad(labels, (0, 1), value=-100)}


def padding_of(example: Any, length: int) -> Tensor:  # Any: the user's batch
    """(S,) mask of the positions that `attention_mask` hides."""
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if isinstance(mask, Tensor) and tuple(mask.shape) == (1, length):
        return mask[0].cpu() == 0
    return torch.zeros(length, dtype=torch.bool)


def ids_of_measures(model: Any, example: Any, length: int) -> Tensor | None:  # Any: the user's
    """(S,) the token ids of the tokens that are measured: the first (1, S) tensor of whole numbers
    in the batch. An encoder and decoder measures its labels.
    """
    tensors = leaves(example)
    if isinstance(example, Mapping):
        decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        names = ("labels", "input_ids") if decodes else ("input_ids", "labels")
        tensors = [example[name] for name in names if name in example] + tensors
    for tensor in tensors:
        whole_numbers = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
        if tuple(tensor.shape) == (1, length) and whole_numbers:
            return tensor[0].cpu()
    return None


def checked_measures(values: Any) -> Tensor:  # Any: what measure_tokens() returned
    """(S,) of the measures of a batch of one."""
    expected = "expected: a differentiable tensor (B, S), one measure per token"
    if not isinstance(values, Tensor):
        raise DefinitionError(f"measure_tokens() returned a {type(values).__name__}", expected)
    if values.ndim != 2 or len(values) != 1:
        raise DefinitionError(
            f"measure_tokens() returned shape {tuple(values.shape)} for a batch of 1", expected
        )
    if not values.requires_grad:
        raise DefinitionError("measure_tokens() returned a tensor without a gradient", expected)
    return values[0]


def check_sum(values_S: Tensor, measure: Tensor, id: int, name: str) -> None:
    """Raises DefinitionError where the measures of tokens do not sum to the measure of the query.
    `name`: of the function that measures queries.
    """
    parts_S, expected = values_S.detach().cpu().double(), measure.cpu().double()
    total, scale = parts_S.sum(), parts_S.abs().sum() + expected.abs()
    if not bool((total - expected).abs() <= rounding(values_S.dtype) * scale):
        sign = "" if name == "measure()" else "-"
        raise DefinitionError(
            f"the measures of measure_tokens() do not sum to the query's {sign}{name}",
            f"found: {float(total):.6g} for query {id}; expected: {float(measure):.6g}",
            "return what measure() sums, or minus what loss() sums, before the sum",
        )
