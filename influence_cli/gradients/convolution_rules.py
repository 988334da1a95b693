"""Hook rules of convolutions and transposed convolutions over 1, 2 or 3 axes.

Letters: I input channels, O output channels, C channels, D numbers of the weight. Rows: the
examples, times the rows of each.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from influence_cli.gradients.deferred_forms import ConvolutionForm
from influence_cli.gradients.forms import Dense, Positions
from influence_cli.gradients.rule import Arguments, Gradients

PerAxis = tuple[int, ...]  # one number for each axis
UNFOLD_BYTES = 2 << 20  # patches that are in memory at once: about the size of a core's cache


def convolution(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Convolution over 1, 2 or 3 axes: each example's weight gradient, and g summed over places."""
    weight: Tensor = call["weight"]
    size, kernel = len(x), tuple(weight.shape[2:])
    x, g = x.flatten(0, 1).to(weight.dtype), g.flatten(0, 1).to(weight.dtype)
    stride, dilation = (per_axis(call.get(name, 1), len(kernel)) for name in ("stride", "dilation"))
    sides = padded_sides(call.get("padding", 0), kernel, dilation)
    form = kernel_gradients(call, x, g, size, stride, dilation, sides)
    return {"weight": form, "bias": sum_over_places(g, size)}


def transposed_convolution(call: Arguments, x: Tensor, g: Tensor) -> Gradients:
    """Its weight (I, O/groups, ...) is the weight of the convolution that maps the output back to
    the input. So its gradient is that of this convolution, with x and g exchanged.
    """
    weight: Tensor = call["weight"]
    size, axes = len(x), weight.ndim - 2
    x, g = x.flatten(0, 1).to(weight.dtype), g.flatten(0, 1).to(weight.dtype)
    stride, dilation = (per_axis(call.get(name, 1), axes) for name in ("stride", "dilation"))
    padding, extra = (per_axis(call.get(name, 0), axes) for name in ("padding", "output_padding"))
    sides = [(before, before - more) for before, more in zip(padding, extra, strict=True)]
    form = kernel_gradients(call, g, x, size, stride, dilation, sides)
    return {"weight": form, "bias": sum_over_places(g, size)}


def kernel_gradients(
    call: Arguments,
    x: Tensor,
    g: Tensor,
    size: int,
    stride: PerAxis,
    dilation: PerAxis,
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

    def outer_products(x: Tensor, g: Tensor) -> Iterator[Positions]:
        return places_and_patches(x, g, weight, stride, padding, dilation, groups)

    return ConvolutionForm(tuple(weight.shape), x, g, len(x) // size, gradients, outer_products)


def sum_over_places(g: Tensor, size: int) -> Dense:
    """(rows, O, places...) summed over places and the rows of each of `size` examples: a bias."""
    channels = g.shape[1]
    return Dense((channels,), g.flatten(2).sum(2).view(size, -1, channels).sum(1))


def per_example_by_groups(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
) -> Tensor:
    """(rows, D) by oneDNN, at the speed of a whole batch's weight gradient, twice that of
    patches.
    """
    rows, axes = len(x), weight.ndim - 2
    weight_gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[axes - 1]
    one = (t.reshape(1, -1, *t.shape[2:]) for t in (x, g))
    shape = (rows * weight.shape[0], *weight.shape[1:])
    return weight_gradient(
        next(one), shape, next(one), stride, padding, dilation, rows * groups
    ).view(rows, -1)


def per_example_by_patches(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
) -> Tensor:
    """(rows, D) as a linear layer on patches, per group: for few channels, other precisions and
    other devices.
    """
    kernel, rows, out = tuple(weight.shape[2:]), len(x), weight.shape[0] // groups
    windows = patches(x, kernel, stride, padding, dilation)
    windows = windows.unflatten(1, (groups, -1))  # (rows, groups, I / groups, *kernel, *places)
    width, places = math.prod(windows.shape[2 : 3 + len(kernel)]), math.prod(g.shape[2:])
    left = g.reshape(rows, groups, out, places)
    values = g.new_empty(rows, groups, out, width)
    step = max(1, UNFOLD_BYTES // (groups * width * places * g.element_size()))
    for first in range(0, rows, step):  # so few that patches stay in the cache
        right = windows[first : first + step].reshape(-1, width, places)
        torch.bmm(
            left[first : first + step].flatten(0, 1),
            right.transpose(1, 2),
            out=values[first : first + step].view(-1, out, width),
        )
    return values.view(rows, -1)


def places_and_patches(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: PerAxis,
    padding: PerAxis,
    dilation: PerAxis,
    groups: int,
) -> Iterator[Positions]:
    """The outer products of g at each place of the output with the patch of x that it reads, per
    group (Grosse and Martens 2016, arXiv:1602.01573). The numbers of a patch are those of the
    weight without its first axis.
    """
    kernel, out = tuple(weight.shape[2:]), weight.shape[0] // groups
    width, places = math.prod(weight.shape[1:]), math.prod(g.shape[2:])
    step = max(1, UNFOLD_BYTES // (groups * width * places * g.element_size()))
    for first in range(0, len(x), step):  # so few that patches stay in the cache
        windows = patches(x[first : first + step], kernel, stride, padding, dilation)
        right = windows.unflatten(1, (groups, -1)).reshape(-1, groups, width, places)
        left = g[first : first + step].reshape(-1, groups, out, places)
        for group in range(groups):
            rows = slice(group * out, (group + 1) * out)
            outer = (part[:, group].transpose(1, 2).flatten(0, 1) for part in (left, right))
            yield rows, next(outer), next(outer)


def per_axis(value: int | Sequence[int], axes: int) -> PerAxis:
    """One number for each axis."""
    if isinstance(value, Sequence):
        return tuple(value) * (axes if len(value) == 1 else 1)
    return (value,) * axes


def padded_sides(
    padding: str | int | Sequence[int], kernel: PerAxis, dilation: PerAxis
) -> list[tuple[int, int]]:
    """Zeros before and after each axis. 'same' puts the odd one after."""
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    numbers = per_axis(0 if isinstance(padding, str) else padding, len(kernel))  # text: 'valid'
    return [(number, number) for number in numbers]


def patches(
    x: Tensor, kernel: PerAxis, stride: PerAxis, padding: PerAxis, dilation: PerAxis
) -> Tensor:
    """A view (rows, C, *kernel, *places): the part of the padded input that each place of the
    output reads.
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
