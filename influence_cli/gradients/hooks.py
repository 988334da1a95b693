"""Per-example gradients by hooks, in one forward and one backward pass with frozen weights.

Autograd then computes the gradients of activations only. At each layer, its rule (layer_rules.py)
turns the layer's input and the gradient at its output into the gradients of its parameters, one per
example. The gradients of a parameter that is used several times are summed.

Some tensors belong to all examples (shared_tensors.py). Where broadcasting combines one with the
batch, it gets an axis of examples first. The gradient at these copies is pulled back to the
parameters. A plan (example_axes.py) knows the axis of examples of each tensor.

Parameters keep requiring gradients; only calls that have a rule see them detached. So autograd
still returns a gradient for a parameter that is used past the hooks, and `Past` reports it.

Letters: B examples, m rows of a layer's batch per example, D numbers of a parameter.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from influence_cli.gradients.example_axes import (
    MIXED,
    Axis,
    AxisPlan,
    TensorCall,
    Unhooked,
    Watcher,
    tensors_in,
)
from influence_cli.gradients.form_ops import merged
from influence_cli.gradients.forms import Dense, Form
from influence_cli.gradients.layer_rules import BROADCAST, EXPAND, RULES
from influence_cli.gradients.rule import Rule
from influence_cli.gradients.shared_tensors import SharedTensors, sum_over_copies

OTHER_OPERATIONS = "its operations are not those of the first batch"
ROLES = ("weight", "bias")

# Any, here and below: arguments and results of any torch function, and whatever `keep` returns


class Hooks(Watcher):
    """Follows one batch of `size` examples under a plan.

    `captured`: what `keep` made of each parameter's gradients, the sum over all its uses.
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
        self.shared = SharedTensors(parameters)
        # a shared tensor, its copies per example, the copies' axis of examples
        self.copies: list[tuple[Tensor, Tensor, Axis]] = []
        # a computed shared tensor, and the gradients (B, ...) at it
        self.computed: list[tuple[Tensor, Tensor]] = []
        self.captured: dict[str, Any] = {}
        self._sums: dict[str, Form] = {}
        self._uses_left: Counter[str] = Counter()
        self._position, self._problem = 0, ""
        first = next(iter(parameters.values()))
        self.token = torch.zeros((), device=first.device, dtype=first.dtype, requires_grad=True)

    # ------------------------------------------------------------ forward pass
    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        step = self.steps[self._position] if self._position < len(self.steps) else None
        self._position += 1
        if step is None or step.function is not function:
            self._problem = self._problem or OTHER_OPERATIONS
        if self._problem or step is None or not torch.is_grad_enabled():
            return function(*args, **kwargs)
        shared = [value for value in tensors_in((args, kwargs)) if value in self.shared]
        if not shared:
            return function(*args, **kwargs)
        return self._call_with_shared(step, args, kwargs, shared)

    def _call_with_shared(
        self,
        step: TensorCall,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shared: Sequence[Tensor],
    ) -> Any:
        """The result of a call that reads shared tensors. Without a rule, autograd returns a
        gradient for the parameter, and `finish` reports it.
        """
        function = step.function
        tensors = tensors_in((args, kwargs))
        axis_of = {id(value): axis for value, axis in zip(tensors, step.axes, strict=False)}
        if step.result is None:
            result = function(*args, **kwargs)
            if all(axis is None for axis in axis_of.values()):
                self.shared.add(tensors_in((result,)))
            return result
        if step.result is not MIXED:
            rule = RULES.get(function)
            call = rule.bind(args, kwargs) if rule else {}
            if rule and (axis := self._rule_axis(rule, call, step.result, axis_of)):
                return self._call_with_rule(rule, function, args, kwargs, call, axis)
            if function in BROADCAST or function in EXPAND:
                return self._call_with_copies(function, args, kwargs, shared, step.result)
        return function(*args, **kwargs)

    def _rule_axis(
        self, rule: Rule, call: Mapping[str, Any], result: Axis, axis_of: Mapping[int, Axis | None]
    ) -> Axis | None:
        """The examples' axis of input and result, where the rule applies to this call: the input
        has examples, the weights have none. Else None.
        """
        x = call["input"]
        weights = [call[role] for role in ROLES if isinstance(call.get(role), Tensor)]
        axis = axis_of.get(id(x))
        if not isinstance(x, Tensor) or axis is None or axis is MIXED or not weights:
            return None
        if x in self.shared or not rule.applies(call):
            return None
        if axis.dim != result.dim or {axis.inner, result.inner} == {False, True}:
            return None
        if rule.rows_first:
            in_front = axis.dim == 0
        else:
            in_front = axis.dim < max(1, x.ndim - rule.feature_axes(call))
        is_lookup = not x.is_floating_point()  # of an embedding every axis is a position
        axis = axis if axis.inner is not None else result  # a layer leaves its positions in place
        fits = (in_front or is_lookup) and axis.tells(x.shape[axis.dim], self.size)
        return axis if fits and all(axis_of.get(id(value)) is None for value in weights) else None

    def _call_with_rule(
        self,
        rule: Rule,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        call: dict[str, Any],
        axis: Axis,
    ) -> Tensor:
        """Call a layer with detached weights; a hook on its output applies the rule."""
        weights = {role: call[role] for role in ROLES if isinstance(call.get(role), Tensor)}
        frozen = {id(value): value.detach() for value in weights.values()}
        result = function(*replaced(args, frozen), **replaced(dict(kwargs), frozen))
        call |= {role: frozen[id(value)] for role, value in weights.items()}
        trained = {role: value for role, value in weights.items() if value in self.shared}
        x = call["input"].detach()
        version = x._version
        for value in trained.values():
            self._uses_left.update(self.shared.owners(value))

        def apply_rule(grad: Tensor) -> None:
            if x._version != version:
                raise Unhooked("a layer's input was changed in place after the layer had read it")
            with torch.no_grad():
                parts = axis.first(x, self.size), axis.first(grad, self.size)
                self.add_of_rule(rule, call, *parts, trained)

        if not result.requires_grad:
            result = StartGraph.apply(result, self.token)
        result.register_hook(apply_rule)
        return result

    def _call_with_copies(
        self,
        function: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        shared: Sequence[Tensor],
        axis: Axis,
    ) -> Any:
        """Give each shared tensor an axis of examples. The call stays as it is where a tensor can
        have none.
        """
        if function in EXPAND:
            copies = function(shared[0].detach(), *args[1:], **kwargs).requires_grad_()
            if not axis.tells(copies.shape[axis.dim], self.size):
                return function(*args, **kwargs)
            self._remember_copies(shared[0], copies, axis)
            return copies
        shapes = [value.shape for value in tensors_in((args, kwargs))]
        dims = max(map(len, shapes))
        rows = max(shape[axis.dim - dims] for shape in shapes if len(shape) >= dims - axis.dim)
        if not axis.tells(rows, self.size):
            return function(*args, **kwargs)
        copies_of = {}
        for value in shared:
            shape = [1] * (dims - value.ndim) + list(value.shape)
            if shape[axis.dim] != 1:
                return function(*args, **kwargs)
            wide = self.copied_shape(shape, shapes)
            wide[axis.dim] = rows
            copies_of[id(value)] = value.detach().view(shape).expand(wide).requires_grad_()
        result = function(*replaced(args, copies_of), **replaced(dict(kwargs), copies_of))
        for value in shared:
            self._remember_copies(value, copies_of[id(value)], axis)
        return result

    def _remember_copies(self, value: Tensor, copies: Tensor, axis: Axis) -> None:
        self.copies.append((value, copies, axis))
        self._uses_left.update(self.shared.owners(value))

    def copied_shape(self, shape: list[int], shapes: Sequence[torch.Size]) -> list[int]:
        """The shape of the copies of a shared tensor, but for the axis of examples. `shapes`: of
        all tensors of the call.
        """
        return list(shape)

    # ------------------------------------------------------------ backward pass
    def finish(self, losses: Tensor) -> None:
        """Run the backward pass and keep each parameter's gradients.

        Raises Unhooked: the batch does not follow the plan. Past: parameters that are used past
        the hooks.
        """
        if self._problem or self._position != len(self.steps):
            raise Unhooked(self._problem or OTHER_OPERATIONS)
        copies = [copy for _, copy, _ in self.copies]
        targets = [self.token, *copies, *self.parameters.values()]
        grads: Sequence[Tensor | None] = [None] * len(targets)
        if losses.requires_grad:
            grads = torch.autograd.grad(losses.sum(), targets, allow_unused=True)
        parameter_grads = zip(self.parameters, grads[1 + len(copies) :], strict=True)
        past = [name for name, grad in parameter_grads if grad is not None]
        if past:
            raise Past(past)
        for (value, copy, axis), grad in zip(self.copies, grads[1:], strict=False):
            if grad is not None:
                self.add_of_copies(value, copy, axis, axis.first(grad, self.size))
        self.end()

    def end(self) -> None:
        """After the backward pass: the gradients of computed tensors, and of parameters without
        one.
        """
        for value, grads_B in self.computed:
            for parameter, grads_BD in self.shared.pull_back(value, grads_B):
                self.add(parameter, Dense(tuple(parameter.shape), grads_BD))
        for name, parameter in self.parameters.items():
            if name in self._sums:
                self.captured[name] = self.keep(name, self._sums.pop(name))
            elif name not in self.captured:
                zeros_BD = parameter.new_zeros(self.size, parameter.numel())
                self.captured[name] = self.keep(name, Dense(tuple(parameter.shape), zeros_BD))

    def add_of_rule(
        self,
        rule: Rule,
        call: Mapping[str, Any],
        x: Tensor,
        grad: Tensor,
        trained: Mapping[str, Tensor],
    ) -> None:
        """Add the gradients of a layer. x and grad (B, m, ...): its input, and the gradient at its
        output. `trained`: its shared tensors, by role.
        """
        forms = rule.gradients(call, x, grad)
        for role, value in trained.items():
            self.add(value, forms[role])

    def add_of_copies(self, value: Tensor, copies: Tensor, axis: Axis, grads: Tensor) -> None:
        """Add the gradients (B, m, ...) at the copies of a shared tensor."""
        grads_BD = sum_over_copies(grads.sum(1), value, copies, axis.dim)
        self.add(value, Dense(tuple(value.shape), grads_BD))

    def add(self, value: Tensor, form: Form) -> None:
        """Add the gradients of one use. The last use hands the sum to `keep`."""
        name = self.shared.name(value)
        if name is None:
            self.computed.append((value, form.dense().values.view(self.size, *value.shape)))
            return
        self._uses_left[name] -= 1
        form = merged(self._sums.pop(name), form) if name in self._sums else form
        if self._uses_left[name] == 0:
            self.captured[name] = self.keep(name, form)
        else:
            self._sums[name] = form


class Past(Unhooked):
    """Autograd returned gradients for these parameters: operations without a rule use them."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(f"a use without a rule of {', '.join(names[:3])}")
        self.names = names


class StartGraph(torch.autograd.Function):
    """The identity, with a graph. The first layer needs it: its output depends on nothing that
    requires a gradient, because its weights are detached.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient.new_zeros(())


AnyHooks = TypeVar("AnyHooks", bound=Hooks)
NewHooks = Callable[[AxisPlan, Mapping[str, nn.Parameter]], AnyHooks]


def hooks_for(size: int, keep: Callable[[str, Form], Any]) -> NewHooks[Hooks]:
    """Makes the hooks of a batch of `size`."""
    return lambda plan, parameters: Hooks(plan, parameters, size, keep)


def replaced(values: Any, by: Mapping[int, Tensor]) -> Any:
    """Nested tuples, lists and dicts with some tensors replaced, by id."""
    if isinstance(values, Tensor):
        return by.get(id(values), values)
    if isinstance(values, dict):
        return {key: replaced(value, by) for key, value in values.items()}
    if isinstance(values, tuple | list) and type(values) in (tuple, list):
        return type(values)(replaced(value, by) for value in values)
    return values
