"""Splits the inner products of an example's gradient with other gradients over its positions.

A position is a token of a text, or a place of any sequence that a model's layers read side by side.
The gradient of a layer's weight is a sum over the positions of the layer's input. So each position
is given to the layer's rule as an example of its own. The share of a position is what its summand
adds to the product, and not the loss of that position.

The axis of positions is the only one with as many entries as the example has tokens; without token
ids, the only one longer than 1 of the first layer that has one.

Letters: S positions, R rows of a form, Q directions, D numbers of a parameter, m rows of a layer's
batch per example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from influence_cli.gradients.example_axes import MIXED, Axis, AxisPlan
from influence_cli.gradients.forms import Dense, Form
from influence_cli.gradients.hooks import Hooks
from influence_cli.gradients.layer_rules import RULES
from influence_cli.gradients.rule import Rule


class Directions(Protocol):
    """Q gradients that an example's gradient is multiplied with."""

    @property
    def count(self) -> int:
        """Q."""

    def products(self, name: str, rows: Form) -> Tensor:
        """(R, Q) float64 inner products with gradients of a parameter."""

    def dense(self, name: str) -> Tensor:
        """(Q, D) of a parameter."""


@dataclass(frozen=True)
class Lookup:
    """The ids (1, m, ...) that an example reads in an embedding."""

    ids_of_one: Tensor
    weight: Tensor
    padding_idx: int | None

    @property
    def ids(self) -> list[int]:
        return self.ids_of_one.flatten().tolist()

    @property
    def padding(self) -> Tensor:
        """(S,) mask."""
        ids = self.ids_of_one.flatten().cpu()
        if self.padding_idx is None:
            return torch.zeros_like(ids, dtype=torch.bool)
        return ids == self.padding_idx % len(self.weight)


class PositionHooks(Hooks):
    """Follows one example, a batch of one.

    `token_weight`: the embedding that token ids go through; None: the first embedding of the
    forward pass. After `finish`: `lengths` of the sequences whose positions count, one after the
    other; `ids` (S,) of their tokens, None where none are known; `padding` (S,): tokens of
    padding; `shares` (S + 1, Q) float64, the last of them what has no position; `has_rest`: whether
    anything has none.
    """

    def __init__(
        self,
        plan: AxisPlan,
        parameters: Mapping[str, nn.Parameter],
        directions: Directions,
        token_weight: Tensor | None,
    ) -> None:
        super().__init__(plan, parameters, 1, lambda name, form: None)
        self.directions, self.token_weight = directions, token_weight
        self.lookups: list[Lookup] = []
        self.first_length: int | None = None
        self.lengths: list[int] = []
        self.ids: Tensor | None = None
        self.padding = torch.zeros(0, dtype=torch.bool)
        self.shares = torch.zeros(0, 0)
        self.has_rest = False
        self._tangents: dict[int, Tensor] = {}

    # ------------------------------------------------------------ forward pass
    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if function is F.embedding and self._position < len(self.steps):
            call = RULES[F.embedding].bind(args, kwargs)
            axis = self.steps[self._position].axes[0]
            if axis is not None and axis is not MIXED:
                ids = axis.first(call["input"].detach(), self.size)
                self.lookups.append(Lookup(ids, call["weight"], call.get("padding_idx")))
        return super().seen(function, args, kwargs)

    def _call_with_rule(
        self,
        rule: Rule,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: dict[str, Any],
        axis: Axis,
    ) -> Tensor:
        if self.first_length is None:
            length = length_of(position_dims(rule, call, axis.first(call["input"], self.size)))
            self.first_length = length if length != 1 else None
        return super()._call_with_rule(rule, function, args, kwargs, call, axis)

    def copied_shape(self, shape: list[int], shapes: Sequence[torch.Size]) -> list[int]:
        """All axes: a copy for each position."""
        return list(torch.broadcast_shapes(*shapes, shape))

    # ------------------------------------------------------------ backward pass
    def finish(self, losses: Tensor) -> None:
        self._find_sequences()
        shape = sum(self.lengths) + 1, self.directions.count
        self.shares = torch.zeros(shape, dtype=torch.float64)
        super().finish(losses)

    def _find_sequences(self) -> None:
        """The sequences of token ids, each once; else that of the first layer with positions."""
        lookups = [lookup for lookup in self.lookups if lookup.weight is self.token_weight]
        sequences: dict[tuple[int, ...], Lookup] = {}
        for lookup in lookups or self.lookups[:1]:
            if length_of(lookup.ids_of_one.shape[1:]) is not None:
                sequences.setdefault(tuple(lookup.ids), lookup)
        if sequences:
            self.lengths = list(map(len, sequences))
            self.ids = torch.cat([torch.tensor(ids) for ids in sequences])
            self.padding = torch.cat([lookup.padding for lookup in sequences.values()])
            for first in self.lengths[:-1]:  # a decoder may start with the padding token
                self.padding[first] = False
        elif self.first_length is not None:
            self.lengths = [self.first_length]
            self.padding = torch.zeros(self.first_length, dtype=torch.bool)

    def place_of(self, dims: Sequence[int]) -> tuple[int, slice] | None:
        """Which of the axes (m, ...) counts positions, and which rows of `shares` are theirs. None:
        none of them, or it is not clear which.
        """
        first, places = 0, []
        for length in self.lengths:
            rows = slice(first, first + length)
            places += [(dim, rows) for dim, size in countable(dims) if size == length]
            first += length
        return places[0] if len(places) == 1 else None

    def add_of_rule(
        self,
        rule: Rule,
        call: Mapping[str, Any],
        x: Tensor,
        grad: Tensor,
        trained: Mapping[str, Tensor],
    ) -> None:
        dims = position_dims(rule, call, x)
        place = self.place_of(dims)
        if place is None:
            super().add_of_rule(rule, call, x, grad, trained)
            return
        dim, rows = place
        x_S, grad_S = (value[0].movedim(dim, 0) for value in (x, grad))
        if len(dims) == 1:  # no axis but m
            x_S, grad_S = x_S.unsqueeze(1), grad_S.unsqueeze(1)
        forms = rule.gradients(call, x_S, grad_S)
        for role, value in trained.items():
            self._add_rows(value, forms[role], rows)

    def add(self, value: Tensor, form: Form) -> None:
        """What has no position."""
        self.has_rest = True
        self._add_rows(value, form, slice(-1, None))

    def _add_rows(self, value: Tensor, form: Form, rows: slice) -> None:
        name = self.shared.name(value)
        if name is not None:
            products_RQ = self.directions.products(name, form)
        else:
            tangents = Dense(tuple(value.shape), self.tangent(value).flatten(1))
            products_RQ = form.dot(tangents)
        self.shares[rows] += products_RQ.cpu().double()

    def add_of_copies(self, value: Tensor, copies: Tensor, axis: Axis, grads: Tensor) -> None:
        """The gradient (1, m, ...) at copies of a shared tensor, one for each position."""
        wide = (1,) * (copies.ndim - value.ndim) + tuple(value.shape)
        tangents = self.tangent(value).view(-1, *wide).movedim(1 + axis.dim, 1)
        place = self.place_of(tuple(grads.shape[1:-1]))  # the last axis has features
        self.has_rest = self.has_rest or place is None
        for q, tangent in enumerate(tangents):
            products = (grads[0] * tangent).cpu().double()  # (m, ...)
            if place is None:
                self.shares[-1, q] += products.sum()
            else:
                dim, rows = place
                self.shares[rows, q] += products.movedim(dim, 0).flatten(1).sum(1)

    def tangent(self, value: Tensor) -> Tensor:
        """(Q, *shape): how a shared tensor changes along the directions; a parameter by them."""
        name = self.shared.name(value)
        if name is not None:
            return self.directions.dense(name).view(-1, *value.shape)
        if id(value) not in self._tangents:
            self._tangents[id(value)] = self._change_along_directions(value)
        return self._tangents[id(value)]

    def _change_along_directions(self, value: Tensor) -> Tensor:
        """J v by two backward passes: J^T u is linear in u, and its derivative is J."""
        names = sorted(self.shared.owners(value))
        parameters = [self.parameters[name] for name in names]
        with torch.enable_grad():
            u = torch.zeros_like(value, requires_grad=True)
            pulled = torch.autograd.grad(value, parameters, u, create_graph=True, allow_unused=True)
            changes = []
            for q in range(self.directions.count):
                total = u.new_zeros(())
                for name, grad in zip(names, pulled, strict=True):
                    if grad is not None:
                        total = total + (grad.flatten() * self.directions.dense(name)[q]).sum()
                changes.append(torch.autograd.grad(total, u, retain_graph=True)[0].detach())
        return torch.stack(changes)

    def end(self) -> None:
        """All gradients were multiplied when they were added."""


def position_dims(rule: Rule, call: Mapping[str, Any], x: Tensor) -> tuple[int, ...]:
    """The axes of a layer's input (1, m, ...) that may count positions: those in front of the
    features. None of a rule that has channels in front.
    """
    if rule.rows_first:
        return ()
    features = rule.feature_axes(call) if x.is_floating_point() else 0  # a lookup has none
    return tuple(x.shape[1 : x.ndim - features])


def countable(dims: Sequence[int]) -> list[tuple[int, int]]:
    """The axes of (m, ...) that may count positions, with their sizes: m where it is not 1."""
    return [(dim, size) for dim, size in enumerate(dims) if dim or size > 1]


def length_of(dims: Sequence[int]) -> int | None:
    """The length of the only axis of (m, ...) that may count positions; None where none or several
    may.
    """
    sizes = [size for _, size in countable(dims)]
    return sizes[0] if len(sizes) == 1 else None
