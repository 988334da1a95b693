"""Hook rules: from a layer's input and the gradient at its output to the per-example gradients of
its parameters. One function a layer.

A rule belongs to the function of torch that the layer's module calls (nn.Linear calls F.linear), so
that modules built on it, subclasses and functional code are seen alike. Padding that nn.ConvNd does
by itself (reflect, circular) has happened before its function is called.

B examples, m rows of the layer's batch per example (1, unless positions were folded into the
batch), S positions, O x I the weight.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from influence_cli.gradients.deferred_forms import ConvolutionForm
from influence_cli.gradients.forms import Dense, Factors, Form
from influence_cli.gradients.sparse_forms import EmbeddingRows

Arguments = Mapping[str, Any]  # of the call, by name; weights and biases detached
Gradients = dict[str, Form]  # "weight" and "bias", as far as they are wanted
UNFOLD_BYTES = 2 << 20  # patches of a convolution held at once: about what a core's cache holds


@dataclass(frozen=True)
class Rule:
    """`gradients(arguments, x, g)`: x (B, m, ...) the input and g (B, m, ...) the gradient at the
    output, examples first.

    `arguments`: the function's parameters in order; `keywords`: those of another name there.
    `applies`: whether the rule is right for these arguments. `rows_first`: the layer's batch must
    be its first axis (otherwise any axis may be).
    """

    arguments: tuple[str, ...]
    gradients: Callable[[Arguments, Tensor, Tensor], Gradients]
    applies: Callable[[Arguments], bool] = lambda arguments: True
    rows_first: bool = False
    keywords: Mapping[str, str] = field(default_factory=dict)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(self.arguments, args, strict=False)) | {
            self.keywords.get(name, name): value for name, value in kwargs.items()
        }


def linear(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """y = x W^T + b over any leading axes: G = sum over positions of g_s (x) x_s."""
    weight: Tensor = call["weight"]
    left, right = positions(g, weight), positions(x, weight)
    return {"weight": Factors(tuple(weight.shape), left, right), "bias": over_positions(left)}


def matmul(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """y = x W (+ b): a linear layer whose weight stands the other way round, as in GPT-2."""
    weight: Tensor = call["weight"]
    left, right = positions(x, weight), positions(g, weight)
    return {"weight": Factors(tuple(weight.shape), left, right), "bias": over_positions(right)}


def convolution(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Convolution over 1, 2 or 3 axes: each example's weight gradient, and g summed over places."""
    weight: Tensor = call["weight"]
    size, kernel = len(x), tuple(weight.shape[2:])
    x, g = x.flatten(0, 1).to(weight.dtype), g.flatten(0, 1).to(weight.dtype)
    stride, padding, dilation = (
        per_axis(call.get(name, default), len(kernel)) for name, default in DEFAULTS.items()
    )
    sides = padded_sides(padding, kernel, dilation)
    form = kernel_gradients(call, x, g, size, stride, dilation, sides)
    return {"weight": form, "bias": over_places(g, size)}


def transposed_convolution(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Its weight (I, O/groups, ...) is that of the convolution that maps the output back to the
    input. So its gradient is that convolution's, with x and g exchanged.
    """
    weight: Tensor = call["weight"]
    size, axes = len(x), weight.ndim - 2
    x, g = x.flatten(0, 1).to(weight.dtype), g.flatten(0, 1).to(weight.dtype)
    stride, padding, dilation = (
        per_axis(call.get(name, default), axes) for name, default in DEFAULTS.items()
    )
    extra = per_axis(call.get("output_padding", 0), axes)
    sides = [(before, before - more) for before, more in zip(padding, extra, strict=True)]
    form = kernel_gradients(call, g, x, size, stride, dilation, sides)
    return {"weight": form, "bias": over_places(g, size)}


def kernel_gradients(
    call: Arguments,
    x: Tensor,
    g: Tensor,
    size: int,
    stride: Any,  # a number for each axis
    dilation: Any,  # as stride
    sides: Sequence[tuple[int, int]],
) -> ConvolutionForm:
    """The weight gradients of a convolution from x (rows, I, ...) to g (rows, O, ...).

    The examples are the groups of one convolution, whose weight gradient holds one gradient per
    example. `sides`: zeros before and after x on each axis; below 0 cuts. `size`: examples.
    """
    weight: Tensor = call["weight"]
    groups = int(call.get("groups", 1))
    padding = tuple(before for before, _ in sides)
    if any(before != after for before, after in sides):
        x = F.pad(x, [number for side in reversed(sides) for number in side])
        padding = (0,) * len(sides)
    of_rows = (
        per_example_by_groups
        if x.is_cpu and x.dtype == torch.float32 and weight.shape[1] >= 8
        else per_example_by_patches
    )

    def gradients(x: Tensor, g: Tensor) -> Tensor:
        return of_rows(x, g, weight, stride, padding, dilation, groups)

    return ConvolutionForm(tuple(weight.shape), x, g, len(x) // size, gradients)


def over_places(g: Tensor, size: int) -> Dense:
    """(rows, O, places...) summed over places and the rows of each of `size` examples: a bias."""
    channels = g.shape[1]
    return Dense((channels,), g.flatten(2).sum(2).view(size, -1, channels).sum(1))


def per_example_by_groups(
    x: Tensor, g: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """(rows, numbers of the weight), by oneDNN: at the speed of a whole batch's weight gradient
    (twice that of patches).
    """
    rows, axes = len(x), weight.ndim - 2
    weight_gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[axes - 1]
    one = (t.reshape(1, -1, *t.shape[2:]) for t in (x, g))
    shape = (rows * weight.shape[0], *weight.shape[1:])
    return weight_gradient(
        next(one), shape, next(one), stride, padding, dilation, rows * groups
    ).view(rows, -1)


def per_example_by_patches(
    x: Tensor, g: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """(rows, numbers of the weight), as a linear layer on patches, per group: for few channels,
    other precisions and other devices.
    """
    kernel, rows, out = tuple(weight.shape[2:]), len(x), weight.shape[0] // groups
    windows = patches(x, kernel, stride, padding, dilation)
    windows = windows.unflatten(1, (groups, -1))  # (rows, groups, I / groups, *kernel, *places)
    width, places = math.prod(windows.shape[2 : 3 + len(kernel)]), math.prod(g.shape[2:])
    left = g.reshape(rows, groups, out, places)
    values = g.new_empty(rows, groups, out, width)
    step = max(1, UNFOLD_BYTES // (groups * width * places * g.element_size()))
    for first in range(0, rows, step):  # few patches at a time: they stay in the cache
        right = windows[first : first + step].reshape(-1, width, places)
        torch.bmm(
            left[first : first + step].flatten(0, 1),
            right.transpose(1, 2),
            out=values[first : first + step].view(-1, out, width),
        )
    return values.view(rows, -1)


DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}


def per_axis(value: Any, axes: int) -> Any:
    """One number for each axis; text ('same', 'valid') as it is."""
    if isinstance(value, str):
        return value
    return (
        tuple(value) * (axes if len(value) == 1 else 1)
        if isinstance(value, tuple | list)
        else (value,) * axes
    )


def padded_sides(padding: Any, kernel: tuple[int, ...], dilation: Any) -> list[tuple[int, int]]:
    """Zeros before and after each axis: 'same' puts the odd one after."""
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(0, 0)] * len(kernel) if padding == "valid" else [(p, p) for p in padding]


def patches(x: Tensor, kernel: tuple[int, ...], stride: Any, padding: Any, dilation: Any) -> Tensor:
    """A view (rows, C, *kernel, *places) of what each place of a convolution's output sees of the
    padded input.
    """
    if any(padding):
        x = F.pad(x, [number for p in reversed(padding) for number in (p, p)])
    x = x.contiguous()
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    places = [
        (n - span - 1) // s + 1 for n, span, s in zip(x.shape[2:], spans, stride, strict=True)
    ]
    steps = x.stride()
    within = [step * d for step, d in zip(steps[2:], dilation, strict=True)]
    between = [step * s for step, s in zip(steps[2:], stride, strict=True)]
    return x.as_strided((*x.shape[:2], *kernel, *places), (*steps[:2], *within, *between))


def embedding(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Lookup of rows: each distinct token's row gets the sum of its positions' gradients; the
    padding token's gets none.
    """
    weight: Tensor = call["weight"]
    tokens, width = weight.shape
    size, padding = len(x), call.get("padding_idx")
    example = torch.arange(size, device=x.device).repeat_interleave(x[0].numel())
    ids, values = x.reshape(-1).long(), g.reshape(-1, width).to(weight.dtype)
    if padding is not None:
        real = ids != padding % tokens
        example, ids, values = example[real], ids[real], values[real]
    keys, place = torch.unique(
        example * tokens + ids, return_inverse=True
    )  # rising: by example, then by token
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
    """y = weight * normed + bias over the last axes, of `shape`: sums over the positions before
    them.
    """
    size = len(g)
    products, sums = (
        (value.reshape(size, -1, math.prod(shape)).sum(1)) for value in (g * normed, g)
    )
    return {"weight": Dense(shape, products), "bias": Dense(shape, sums)}


def positions(value: Tensor, weight: Tensor) -> Tensor:
    """(B, ..., n) as (B, S, n), in the weight's precision."""
    return value.reshape(len(value), -1, value.shape[-1]).to(weight.dtype)


def over_positions(value: Tensor) -> Dense:
    """(B, S, n) summed over the positions; of one position the same tensor, which is then kept
    once.
    """
    return Dense((value.shape[2],), value[:, 0] if value.shape[1] == 1 else value.sum(1))


def reads_only(call: Arguments) -> bool:
    """An embedding that neither rescales its rows nor its gradients."""
    return (
        not call.get("max_norm") and not call.get("scale_grad_by_freq") and call["weight"].ndim == 2
    )


def is_matrix(call: Arguments) -> bool:
    return call["weight"].ndim == 2 and call["input"].ndim >= 2


def plain_sum(call: Arguments) -> bool:
    return is_matrix(call) and call.get("beta", 1) == 1 and call.get("alpha", 1) == 1


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
RULES: dict[Callable[..., Any], Rule] = {
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
    F.layer_norm: Rule(("input", "normalized_shape", "weight", "bias", "eps"), layer_norm),
    F.rms_norm: Rule(("input", "normalized_shape", "weight", "eps"), rms_norm),
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
# Where a parameter meets a batch by broadcasting; it is given an axis of examples just before.
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
