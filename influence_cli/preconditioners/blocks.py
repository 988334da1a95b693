"""Which parameters share a block of the curvature: the weight and the bias of a layer.

A layer y = W a + b is one matrix [W | b] times [a; 1], so the gradient of both is [G | g] (K-FAC's
homogeneous coordinates, Martens and Grosse 2015, arXiv:1503.05671).

Letters: N examples, S positions, O x I the gradient of a weight as a matrix, D = O I.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from influence_cli.gradients.forms import Dense, Factors, Form
from influence_cli.preconditioners.block_statistics import matrix_shape, with_ones
from influence_cli.run.parameters import Column

ROUNDING = 0.02  # of the cache's coarsest format, int8


@dataclass(frozen=True)
class Block:
    """One parameter, or a weight and its bias. `axis`: of the matrix to which the bias is appended,
    1 as a column [G | g], 0 as a row.
    """

    weight: str
    bias: str | None = None
    axis: int = 1

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def join(self, forms: Mapping[str, Form]) -> Form:
        """The gradients of the block: factors where those of the weight are."""
        form = forms[self.weight]
        if self.bias is None:
            return form
        bias_NB = forms[self.bias].dense().values
        shape = list(matrix_shape(form))
        shape[self.axis] += 1
        if isinstance(form, Factors):
            sides = [form.left, form.right]
            if is_sum(sides[1 - self.axis], bias_NB):
                sides[self.axis] = with_ones(sides[self.axis])
                return Factors(tuple(shape), *sides)
        values_NOI = form.dense().values.view(len(form), *matrix_shape(form))
        values_NOI = torch.cat([values_NOI, bias_NB.unsqueeze(1 + self.axis)], 1 + self.axis)
        return Dense(tuple(shape), values_NOI.flatten(1))

    def split(self, mapped: Form, forms: Mapping[str, Form]) -> dict[str, Form]:
        """The columns of gradients that `join` made from forms like these."""
        if self.bias is None:
            return {self.weight: mapped}
        weight, bias = forms[self.weight], forms[self.bias]
        values_NOI = mapped.dense().values.view(len(mapped), *mapped.shape)
        length = mapped.shape[self.axis] - 1
        weight_NOI = values_NOI.narrow(1 + self.axis, 0, length)
        bias_NB = values_NOI.select(1 + self.axis, length)
        return {
            self.weight: Dense(weight.shape, weight_NOI.flatten(1).to(weight.dtype)),
            self.bias: Dense(bias.shape, bias_NB.to(bias.dtype).contiguous()),
        }


def is_sum(values_NSB: Tensor, bias_NB: Tensor) -> bool:
    """Whether the bias has its gradient from the same positions as the weight. A weight that is
    also used without the bias has more.
    """
    sizes = values_NSB.abs()
    scale = sizes.sum(1).amax(1) + values_NSB.shape[1] ** 0.5 * sizes.amax((1, 2))
    distance = (values_NSB.sum(1) - bias_NB).abs().amax(1)
    return bool((distance <= ROUNDING * scale).all())


def join_biases(
    model: nn.Module, columns: Mapping[str, Column], names: Sequence[str]
) -> dict[str, Block]:
    """The blocks of these columns, by the names of their weights. Tied parameters are alone."""
    joint = {}
    for name in names:
        layer, _, end = name.rpartition(".")
        bias = f"{layer}.bias" if layer else "bias"
        axis = bias_axis(model.get_submodule(layer)) if end == "weight" else None
        if axis is None or bias not in names:
            continue
        if len(columns[name].names) == len(columns[bias].names) == 1:
            joint[name] = Block(name, bias, axis)
    biases = {block.bias for block in joint.values()}
    return {name: joint.get(name, Block(name)) for name in names if name not in biases}


def bias_axis(layer: nn.Module) -> int | None:
    """Where the bias of a layer belongs; None: the gradient of its bias is not a sum over the
    positions of its weight's.
    """
    is_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if isinstance(layer, nn.Linear) or is_convolution:
        return 1
    return 0 if type(layer).__name__ == "Conv1D" else None  # GPT-2's: W has inputs in rows
