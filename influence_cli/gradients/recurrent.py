"""Recurrent layers (LSTM, GRU, RNN) step by step, so that the rule of linear layers sees them.

torch computes a recurrent layer in one call that no rule can follow. Here each layer makes two
calls of F.linear: one for the inputs of all steps, and one for the hidden states before all steps.
For the second, a first pass without a graph computes the hidden states. A step then adds
W (h - h'), where h is its hidden state, h' that of the first pass, and W a constant. This is zero
up to rounding, and carries the gradient to earlier steps.

Letters: T steps, B examples, H hidden numbers, G gates times H.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

# (x, weight, bias) -> x W^T + b
Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
# gates (B, G) of the input and of the hidden state, and the state (h, c) -> the next state
Cell = Callable[[Tensor, Tensor, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]
Function = Callable[..., Any]  # Any: results of torch functions


def lstm_cell(x: Tensor, hidden: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + hidden).chunk(4, dim=1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x: Tensor, hidden: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, dim=1), hidden.chunk(3, dim=1)
    z = (x_z + h_z).sigmoid()
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return (1 - z) * n + z * state[0], state[1]


def tanh_cell(x: Tensor, hidden: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (x + hidden).tanh(), state[1]


def relu_cell(x: Tensor, hidden: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return (x + hidden).relu(), state[1]


CELLS: dict[Function, Cell] = {
    torch.lstm: lstm_cell,
    torch.gru: gru_cell,
    torch.rnn_tanh: tanh_cell,
    torch.rnn_relu: relu_cell,
}


def is_recurrent(function: Function, args: Sequence[Any]) -> bool:
    """Whether `step_by_step` knows a call: of a batch that is not packed, without projections of
    the hidden state, and without dropout.
    """
    if function not in CELLS or len(args) != 9 or not isinstance(args[2], list | tuple):
        return False
    x, _, weights, biases, layers, dropout, train, both_ways, _ = args
    per_layer = (4 if biases else 2) * (2 if both_ways else 1)
    return x.ndim == 3 and len(weights) == layers * per_layer and not (train and dropout)


def step_by_step(function: Function, args: Sequence[Any], linear: Linear) -> tuple[Tensor, ...]:
    """What `function(*args)` returns: the outputs and the last hidden state, of an LSTM also the
    last cell state. `linear` makes the calls of F.linear.
    """
    x, hx, weights, biases, layers, _, _, both_ways, batch_first = args
    states = hx if function is torch.lstm else (hx, hx)
    directions, count = (2 if both_ways else 1), (4 if biases else 2)
    value = x.transpose(0, 1) if batch_first else x
    last: list[tuple[Tensor, Tensor]] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            own = weights[place * count : (place + 1) * count]
            state = states[0][place], states[1][place]
            way = value.flip(0) if direction else value
            output, end = one_layer(function, way, state, own, linear)
            outputs.append(output.flip(0) if direction else output)
            last.append(end)
        value = torch.cat(outputs, dim=2) if both_ways else outputs[0]
    results = [value.transpose(0, 1) if batch_first else value, torch.stack([h for h, _ in last])]
    if function is torch.lstm:
        results.append(torch.stack([c for _, c in last]))
    return tuple(results)


def one_layer(
    function: Function,
    x: Tensor,
    state: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    linear: Linear,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """(T, B, H) outputs of one layer in one direction, and its last state."""
    (w_x, w_h), (b_x, b_h) = weights[:2], (weights[2:] or (None, None))
    with torch.no_grad():
        first = tuple(value[None].contiguous() for value in state)
        start = first if function is torch.lstm else first[0]
        constant = [value.detach() for value in weights]
        values = function(x, start, constant, b_x is not None, 1, 0.0, False, False, False)[0]
        before = torch.cat([state[0][None], values[:-1]])
    gates_x, gates_h = linear(x, w_x, b_x), linear(before, w_h, b_h)
    frozen, outputs = w_h.detach(), []
    for step in range(len(x)):
        moved = F.linear(state[0] - before[step], frozen)
        state = CELLS[function](gates_x[step], gates_h[step] + moved, state)
        outputs.append(state[0])
    return torch.stack(outputs), state
