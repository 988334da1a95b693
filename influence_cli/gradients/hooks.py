"""Per-example gradients by hooks: one batched forward and backward in which weights are frozen and
each layer's output is watched.

Autograd then computes activation gradients only; a layer's rule (layer_rules.py) turns its input
and the gradient at its output into the gradients of its parameters, example by example. A parameter
used several times sums its uses.

What depends on no example (a table of positions, a weight computed from two parameters) stays one
for all; where it meets the batch by broadcasting it is given an axis of examples, and the gradient
there is pulled back to the parameters. Which axis is the examples' is known from a plan (plans.py).

Parameters keep requiring gradients, and only calls that have a rule see them detached: whatever
gradient still arrives at a parameter came past the hooks, and is reported instead of lost.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.gradients.example_axes import (
    MIXED,
    Axis,
    AxisPlan,
    Unhooked,
    Watcher,
    tensors_in,
)
from influence_cli.gradients.form_ops import merged
from influence_cli.gradients.forms import Dense, Form
from influence_cli.gradients.layer_rules import BROADCAST, EXPAND, RULES
from influence_cli.gradients.rule import Rule


class Hooks(Watcher):
    """One batch of `size` under a plan. `found`: per parameter what was taken; `keep` turns the sum
    of its uses into that.
    """

    def __init__(
        self,
        plan: AxisPlan,
        parameters: Mapping[str, nn.Parameter],
        size: int,
        keep: Callable[[str, Form], Any],
    ) -> None:
        super().__init__()
        self.steps, self.parameters, self.size, self.keep = plan.steps, parameters, size, keep
        self.name_of = {id(parameter): name for name, parameter in parameters.items()}
        self.shared: dict[int, Tensor] = {
            id(parameter): parameter for parameter in parameters.values()
        }  # one for all examples
        self.cuts: list[
            tuple[Tensor, Tensor, Axis]
        ] = []  # a shared tensor, its copies per example, their axis
        self.pulls: list[
            tuple[Tensor, Tensor]
        ] = []  # a shared tensor that is computed, and the gradients (B, ...) at it
        self.captured: dict[str, Any] = {}
        self._sums: dict[str, Form] = {}
        self._waiting: Counter[str] = Counter()
        self._at, self._problem = 0, ""
        token = next(iter(parameters.values()))
        self.token = torch.zeros((), device=token.device, dtype=token.dtype, requires_grad=True)

    # ------------------------------------------------------------ forward
    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        step = self.steps[self._at] if self._at < len(self.steps) else None
        self._at += 1
        if step is None or step.function is not function:
            self._problem = self._problem or "its operations are not those of the first batch"
        if self._problem or step is None or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        given = list(tensors_in((args, kwargs)))
        shared = [value for value in given if self._is_shared(value)]
        if not shared:
            return function(*args, **kwargs)
        axis_of = {id(value): axis for value, axis in zip(given, step.axes, strict=False)}
        if step.result is None:
            result = function(*args, **kwargs)
            if all(axis is None for axis in axis_of.values()):
                self.shared |= {
                    id(value): value for value in tensors_in((result,)) if value.requires_grad
                }
            return result
        if step.result is not MIXED:
            rule = RULES.get(function)
            call = rule.bind(args, kwargs) if rule else {}
            if rule and (axis := self._fits(rule, call, step.result, axis_of)):
                return self._hooked(rule, function, args, kwargs, call, axis)
            if function in BROADCAST or function in EXPAND:
                return self._cut(function, args, kwargs, shared, step.result)
        return function(
            *args, **kwargs
        )  # no rule: the gradient arrives at the parameter, and is noticed there

    def _is_shared(self, value: Tensor) -> bool:
        """A parameter, what was computed from parameters alone, or a part of one (attention splits
        its packed weights unseen).
        """
        if (
            id(value) not in self.shared
            and value._base is not None
            and id(value._base) in self.shared
            and value.requires_grad
        ):
            self.shared[id(value)] = value
        return id(value) in self.shared

    def _fits(
        self, rule: Rule, call: Mapping[str, Any], result: Axis, axis_of: Mapping[int, Axis | None]
    ) -> Axis | None:
        """The axis of input and result where a call is one of its rule: examples in the input, none
        in the weights; else None.
        """
        x, roles = (
            call["input"],
            [call[role] for role in ("weight", "bias") if isinstance(call.get(role), Tensor)],
        )
        axis = axis_of.get(id(x))
        if (
            not isinstance(x, Tensor)
            or axis is None
            or axis is MIXED
            or not roles
            or id(x) in self.shared
            or not rule.applies(call)
        ):
            return None
        leading = (
            axis.dim == 0
            if rule.rows_first
            else axis.dim < max(1, x.ndim - rule.feature_axes(call))
        )
        lookup = not x.is_floating_point()  # of an embedding every axis is a position
        if axis.dim != result.dim or {axis.inner, result.inner} == {False, True}:
            return None
        axis = axis if axis.inner is not None else result  # a layer leaves its positions in place
        is_certain = axis.tells(x.shape[axis.dim], self.size)
        return (
            axis
            if (leading or lookup)
            and is_certain
            and all(axis_of.get(id(value)) is None for value in roles)
            else None
        )

    def _hooked(
        self,
        rule: Rule,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: dict[str, Any],
        axis: Axis,
    ) -> Tensor:
        roles = {
            role: call[role] for role in ("weight", "bias") if isinstance(call.get(role), Tensor)
        }
        frozen = {id(value): value.detach() for value in roles.values()}
        result = function(*replaced(args, frozen), **replaced(dict(kwargs), frozen))
        call |= {role: frozen[id(value)] for role, value in roles.items()}
        wanted = {role: value for role, value in roles.items() if id(value) in self.shared}
        x = call["input"].detach()
        version = x._version
        self._waiting.update(name for value in wanted.values() for name in self._owners(value))

        def take(gradient: Tensor) -> None:
            if x._version != version:
                raise Unhooked("a layer's input was changed in place after the layer had read it")
            with torch.no_grad():
                forms = rule.gradients(
                    call, axis.first(x, self.size), axis.first(gradient, self.size)
                )
                for role, value in wanted.items():
                    self._add(value, forms[role])

        if not result.requires_grad:
            result = Begin.apply(result, self.token)
        result.register_hook(take)
        return result

    def _cut(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shared: Sequence[Tensor],
        grown: Axis,
    ) -> Any:
        """Give each shared tensor an axis of examples; where it can't have one the call stays as it
        is, and is noticed.
        """
        if function in EXPAND:
            copies = function(shared[0].detach(), *args[1:], **kwargs).requires_grad_()
            if not grown.tells(copies.shape[grown.dim], self.size):
                return function(*args, **kwargs)
            self._remember(shared[0], copies, grown)
            return copies
        shapes = [value.shape for value in tensors_in((args, kwargs))]
        dims = max(map(len, shapes))
        rows = max(shape[grown.dim - dims] for shape in shapes if len(shape) >= dims - grown.dim)
        if not grown.tells(rows, self.size):
            return function(*args, **kwargs)
        swapped = {}
        for value in shared:
            shape = [1] * (dims - value.ndim) + list(value.shape)
            if shape[grown.dim] != 1:
                return function(*args, **kwargs)
            wide = [rows if dim == grown.dim else n for dim, n in enumerate(shape)]
            swapped[id(value)] = value.detach().view(shape).expand(wide).requires_grad_()
        result = function(*replaced(args, swapped), **replaced(dict(kwargs), swapped))
        for value in shared:
            self._remember(value, swapped[id(value)], grown)
        return result

    def _remember(self, value: Tensor, copy: Tensor, grown: Axis) -> None:
        self.cuts.append((value, copy, grown))
        self._waiting.update(self._owners(value))

    def _owners(self, value: Tensor) -> set[str]:
        """The parameters that a shared tensor is, or was computed from."""
        if id(value) in self.name_of:
            return {self.name_of[id(value)]}
        owners, todo, seen = set(), [value.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            owners.add(self.name_of.get(id(getattr(node, "variable", None)), ""))
            todo += [following for following, _ in node.next_functions]
        return owners - {""}

    # ------------------------------------------------------------ backward
    def finish(self, losses: Tensor) -> None:
        """Backward, and what each parameter got. Raises Unhooked where some of it came past the
        hooks, naming the parameters.
        """
        if self._problem or self._at != len(self.steps):
            raise Unhooked(self._problem or "its operations are not those of the first batch")
        copies = [copy for _, copy, _ in self.cuts]
        targets = [self.token, *copies, *self.parameters.values()]
        grads = (
            torch.autograd.grad(losses.sum(), targets, allow_unused=True)
            if losses.requires_grad
            else [None] * len(targets)
        )
        past = [
            name
            for name, grad in zip(self.parameters, grads[1 + len(copies) :], strict=True)
            if grad is not None
        ]
        if past:
            raise Past(past)
        for (value, copy, axis), grad in zip(self.cuts, grads[1:], strict=False):
            if grad is not None:
                self._add(
                    value,
                    Dense(
                        tuple(value.shape),
                        summed_to(axis.first(grad, self.size).sum(1), value, copy, axis.dim),
                    ),
                )
        for value, gradient in self.pulls:
            self._pull(value, gradient)
        for name, parameter in self.parameters.items():
            if name in self._sums:
                self.captured[name] = self.keep(name, self._sums.pop(name))
            elif name not in self.captured:
                self.captured[name] = self.keep(
                    name,
                    Dense(
                        tuple(parameter.shape), parameter.new_zeros(self.size, parameter.numel())
                    ),
                )

    def _add(self, value: Tensor, form: Form) -> None:
        name = self.name_of.get(id(value))
        if name is None:
            self.pulls.append((value, form.dense().values.view(self.size, *value.shape)))
            return
        self._waiting[name] -= 1
        form = merged(self._sums.pop(name), form) if name in self._sums else form
        if self._waiting[name] == 0:
            self.captured[name] = self.keep(name, form)
        else:
            self._sums[name] = form

    def _pull(self, value: Tensor, gradient: Tensor) -> None:
        """From gradients (B, ...) at a shared tensor to those of the parameters that it was
        computed from.
        """
        owners = list(self.parameters.values())
        pulled = torch.autograd.grad(
            value, owners, gradient, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        for parameter, grad in zip(owners, pulled, strict=True):
            if grad is not None:
                self._add(
                    parameter, Dense(tuple(parameter.shape), grad.detach().reshape(self.size, -1))
                )


class Past(Unhooked):
    """Gradients arrived at these parameters past the hooks: they are used where no rule knows."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"a use without a rule of {', '.join(names[:3])}")
        self.names = names


class Begin(torch.autograd.Function):
    """The identity that begins a tape: the first layers' outputs depend on nothing that needs a
    gradient, their weights being frozen.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.new_zeros(())


def summed_to(gradient: Tensor, value: Tensor, copy: Tensor, dim: int) -> Tensor:
    """(B, D) of a gradient (B, ...) at copies of `value`, summed over the axes along which it was
    repeated.
    """
    shape = [1] * (copy.ndim - value.ndim) + list(value.shape)
    del shape[dim]
    repeated = [
        axis + 1 for axis, n in enumerate(shape) if n == 1 and gradient.shape[axis + 1] != 1
    ]
    return (gradient.sum(repeated) if repeated else gradient).reshape(len(gradient), -1)


def replaced(values: Any, by: Mapping[int, Tensor]) -> Any:
    """Nested tuples, lists and dicts with some tensors replaced, by identity."""
    if isinstance(values, Tensor):
        return by.get(id(values), values)
    if isinstance(values, dict):
        return {key: replaced(value, by) for key, value in values.items()}
    if isinstance(values, tuple | list) and type(values) in (tuple, list):
        return type(values)(replaced(value, by) for value in values)
    return values
