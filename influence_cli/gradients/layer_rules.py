"""Layer rules: from a layer's input and the gradient at its output to the per-example gradients of
its parameters. One function per layer.

A rule belongs to the torch function that the module calls (nn.Linear calls F.linear), so it also
covers subclasses and functional code. nn.ConvNd pads by itself (reflect, circular) before it calls
its function.

Letters: B examples, m rows of the layer's batch per example (1, unless the model folds positions
into the batch), S positions, O x I the weight.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from influence_cli.gradients.convolution_rules import convolution, transposed_convolution
from influence_cli.gradients.forms import Dense, Factors
from influence_cli.gradients.rule import Arguments, Gradients, Rule
from influence_cli.gradients.sparse_forms import EmbeddingRows

MOST_LIVE = 0.75  # of the positions; copying more than that costs more than it saves


def linear(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """y = x W^T + b over any leading axes: G = sum over positions of g_s (x) x_s."""
    weight: Tensor = call["weight"]
    left, right = live_positions(positions(g, weight), positions(x, weight))
    return {"weight": Factors(tuple(weight.shape), left, right), "bias": over_positions(left)}


def matmul(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """y = x W (+ b): a linear layer with a transposed weight, as in GPT-2."""
    weight: Tensor = call["weight"]
    right, left = live_positions(positions(g, weight), positions(x, weight))
    return {"weight": Factors(tuple(weight.shape), left, right), "bias": over_positions(right)}


def embedding(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Lookup of rows: the row of each distinct token gets the sum of its positions' gradients. The
    padding token gets none.
    """
    weight: Tensor = call["weight"]
    tokens, width = weight.shape
    size, padding = len(x), call.get("padding_idx")
    example = torch.arange(size, device=x.device).repeat_interleave(x[0].numel())
    ids, values = x.reshape(-1).long(), g.reshape(-1, width).to(weight.dtype)
    if padding is not None:
        real = ids != padding % tokens
        example, ids, values = example[real], ids[real], values[real]
    # ascending by example, then by token
    keys, place = torch.unique(example * tokens + ids, return_inverse=True)
    summed = values.new_zeros(len(keys), width).index_add_(0, place, values)
    counts = torch.bincount(keys // tokens, minlength=size)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return {"weight": EmbeddingRows((tokens, width), keys % tokens, summed, offsets)}


def layer_norm(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    shape = tuple(call["normalized_shape"])
    return affine(shape, F.layer_norm(x, shape, None, None, call.get("eps", 1e-5)), g)


def rms_norm(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    shape = tuple(call["normalized_shape"])
    return affine(shape, F.rms_norm(x, shape, None, call.get("eps")), g)


def group_norm(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    normed = F.group_norm(
        x.flatten(0, 1), call["num_groups"], None, None, call.get("eps", 1e-5)
    ).view(x.shape)
    return affine((x.shape[2],), normed.movedim(2, -1), g.movedim(2, -1))


def batch_norm(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """In eval mode: the running statistics are constants."""
    mean, variance = call["running_mean"], call["running_var"]
    normed = F.batch_norm(
        x.flatten(0, 1), mean, variance, None, None, False, 0.0, call.get("eps", 1e-5)
    ).view(x.shape)
    return affine((x.shape[2],), normed.movedim(2, -1), g.movedim(2, -1))


def affine(shape: tuple[int, ...], normed: Tensor, g: Tensor) -> Gradients:
    """y = weight * normed + bias over the last axes, of `shape`. Sums over all other axes."""
    size = len(g)
    products, sums = (
        (value.reshape(size, -1, math.prod(shape)).sum(1)) for value in (g * normed, g)
    )
    return {"weight": Dense(shape, products), "bias": Dense(shape, sums)}


def positions(value: Tensor, weight: Tensor) -> Tensor:
    """(B, ..., n) as (B, S, n), in the weight's precision."""
    return value.reshape(len(value), -1, value.shape[-1]).to(weight.dtype)


def live_positions(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both (B, S, n), without the positions at which g is zero in all examples. The last block of
    a classifier that reads one position has many.

    It looks at all examples only where the first one has many such positions. Not on a GPU, which
    would have to finish its work for that.
    """
    if not g.is_cpu or g.shape[1] == 1 or not len(g):
        return g, x
    if int(g[0].any(1).sum()) > MOST_LIVE * g.shape[1]:
        return g, x
    live = g.flatten(2).any(2).any(0)
    live[0] |= ~live.any()  # at least one position
    if int(live.sum()) > MOST_LIVE * len(live):
        return g, x
    return g[:, live], x[:, live]


def over_positions(value: Tensor) -> Dense:
    """(B, S, n) summed over the positions. With one position it is the same tensor, which the
    cache stores once.
    """
    return Dense((value.shape[2],), value[:, 0] if value.shape[1] == 1 else value.sum(1))


def reads_only(call: Arguments) -> bool:
    """Whether an embedding rescales neither its rows nor its gradients."""
    return (
        not call.get("max_norm") and not call.get("scale_grad_by_freq") and call["weight"].ndim == 2
    )


def is_matrix(call: Arguments) -> bool:
    return call["weight"].ndim == 2 and call["input"].ndim >= 2


def plain_sum(call: Arguments) -> bool:
    return is_matrix(call) and call.get("beta", 1) == 1 and call.get("alpha", 1) == 1


def normalized_axes(call: Arguments) -> int:
    return len(call["normalized_shape"])


CONVOLUTION = Rule(
    ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    convolution,
    rows_first=True,
)
TRANSPOSED_CONVOLUTION = Rule(
    ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"),
    transposed_convolution,
    rows_first=True,
)
MATMUL = Rule(("input", "weight"), matmul, is_matrix, keywords={"other": "weight"})
ADDMM = Rule(
    ("bias", "input", "weight"),
    matmul,
    plain_sum,
    keywords={"input": "bias", "mat1": "input", "mat2": "weight"},
)
RULES: dict[Callable[..., Any], Rule] = {  # Any: results of torch functions
    F.linear: Rule(("input", "weight", "bias"), linear, is_matrix),
    torch.matmul: MATMUL,
    Tensor.matmul: MATMUL,
    Tensor.__matmul__: MATMUL,
    torch.addmm: ADDMM,
    F.conv1d: CONVOLUTION,
    F.conv2d: CONVOLUTION,
    F.conv3d: CONVOLUTION,
    F.conv_transpose1d: TRANSPOSED_CONVOLUTION,
    F.conv_transpose2d: TRANSPOSED_CONVOLUTION,
    F.conv_transpose3d: TRANSPOSED_CONVOLUTION,
    F.embedding: Rule(
        ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
        embedding,
        reads_only,
    ),
    F.layer_norm: Rule(
        ("input", "normalized_shape", "weight", "bias", "eps"),
        layer_norm,
        feature_axes=normalized_axes,
    ),
    F.rms_norm: Rule(
        ("input", "normalized_shape", "weight", "eps"), rms_norm, feature_axes=normalized_axes
    ),
    F.group_norm: Rule(
        ("input", "num_groups", "weight", "bias", "eps"), group_norm, rows_first=True
    ),
    F.batch_norm: Rule(
        ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
        batch_norm,
        lambda call: not call.get("training") and call["running_mean"] is not None,
        rows_first=True,
    ),
}
# functions that broadcast a parameter to a batch; hooks give it an axis of examples before
BROADCAST = {
    getattr(owner, f"{name}{end}")
    for owner, ends in ((torch, ("",)), (Tensor, ("", "_")))
    for name in ("add", "sub", "mul", "div")
    for end in ends
} | {
    getattr(Tensor, f"__{prefix}{name}__")
    for prefix in ("", "r", "i")
    for name in ("add", "sub", "mul", "truediv")
}
EXPAND = {Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to}
