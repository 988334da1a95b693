"""Find the axis of examples in each tensor of a forward pass.

The model runs on two examples, and on the same two twice. The axis that doubles counts examples.
The plan lists the calls of torch functions in order; hooks.py follows it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from influence_cli.gradients.batches import Batch
from influence_cli.gradients.recurrent import is_recurrent, step_by_step

# Any, here and below: arguments and results of any torch function


class Unhooked(Exception):
    """The hooks can't follow this batch: its operations differ from the plan, or some gradient
    bypasses them.
    """


@dataclass(frozen=True)
class Axis:
    """The axis of a tensor that counts examples.

    It may count other positions, too. `inner`: then the example varies fastest. None: unknown.
    """

    dim: int
    inner: bool | None = False

    def tells(self, rows: int, size: int) -> bool:
        """Whether `rows` along the axis can be split into `size` examples."""
        return rows == size or (self.inner is not None and rows % size == 0)

    def first(self, value: Tensor, size: int) -> Tensor:
        """(B, m, ...): the examples first, then the other positions of their axis."""
        if value.shape[self.dim] == size:
            return value.movedim(self.dim, 0).unsqueeze(1)
        if not self.tells(value.shape[self.dim], size):
            raise Unhooked(f"an axis of {value.shape[self.dim]} for {size} examples")
        rows = value.shape[self.dim] // size
        parts = value.movedim(self.dim, 0).unflatten(
            0, (rows, size) if self.inner else (size, rows)
        )
        return parts.transpose(0, 1) if self.inner else parts


# several axes grow with the examples: products of examples with each other
MIXED = Axis(-1)


@dataclass(frozen=True)
class TensorCall:
    """One call of a torch function: the axes of its tensors (None: a tensor that all examples
    share), and of its first result.
    """

    function: Callable[..., Any]
    axes: tuple[Axis | None, ...]
    result: Axis | None


@dataclass(frozen=True)
class AxisPlan:
    """The calls of a batch, in order. `activations`: bytes per example that they compute."""

    steps: tuple[TensorCall, ...] = ()
    activations: float = 0.0


def make_plan(forward: Callable[[Batch], Any], two: Batch, twice: Batch, size: int) -> AxisPlan:
    """The plan of `forward`. `two`: a batch of `size` examples. `twice`: the same examples twice.

    Raises Unhooked where the two runs differ in more than sizes.
    """
    single, double = RowRecorder(), RowRecorder()
    with single:
        forward(two)
    double.other, double.size = single.calls, size
    with double:
        forward(twice)
    if len(double.calls) != len(single.calls):
        raise Unhooked("the model computes differently for other batch sizes")
    return AxisPlan(tuple(double.steps), (double.bytes - single.bytes) / size)


class Watcher(TorchFunctionMode, ABC):
    """Sees each call of a torch function, also the linear layers inside attention."""

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.multi_head_attention_forward:
            return self.attention(function, args, kwargs)
        if is_recurrent(function, args):
            return step_by_step(function, args, lambda *call: self.seen(F.linear, call, {}))
        if getattr(function, "__name__", "") in ("__get__", "__set__"):
            return function(*args, **kwargs)
        return self.seen(function, args, kwargs)

    def attention(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Attention calls F.linear where no mode sees it. So replace the name in
        torch.nn.functional, and restore it afterwards.
        """
        plain = F.linear
        F.linear = lambda *a, **k: self.seen(plain, a, k)
        try:
            return function(*args, **kwargs)
        finally:
            F.linear = plain

    @abstractmethod
    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Makes the call. Each subclass says what it records of it."""


class RowRecorder(Watcher):
    """Records the shapes of every call. A second run has the calls of the first in `other`, and
    records the axes that grew with the examples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[torch.Size]]] = []
        self.other: list[tuple[Any, list[torch.Size]]] | None = None
        self.steps: list[TensorCall] = []
        self.size, self.bytes = 0, 0
        # `inner` of an axis whose values do not show it
        self.inner_default: bool | None = None

    def attention(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Attention's last projection reads (L * B, E), with examples inside. For a single key its
        rows are equal, so their values do not show it.
        """
        query = kwargs["query"] if "query" in kwargs else args[0]
        self.inner_default = True if query.ndim == 3 and query.shape[1] == 2 * self.size else None
        try:
            return super().attention(function, args, kwargs)
        finally:
            self.inner_default = None

    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        given = [value.detach() for value in tensors_in((args, kwargs))]
        shapes = [value.shape for value in given]
        axes: list[Axis | None] = []
        if self.other is not None:
            then, sizes = (
                self.other[len(self.calls)] if len(self.calls) < len(self.other) else (None, [])
            )
            if then is not function or len(shapes) > len(sizes):
                raise Unhooked("the model computes differently for other batch sizes")
            axes = [
                find_axis(value, shape, self.size, self.inner_default)
                for value, shape in zip(given, sizes, strict=False)
            ]
        result = function(*args, **kwargs)
        outputs = [value.detach() for value in tensors_in((result,))][:1]
        is_new = outputs and outputs[0].data_ptr() not in {value.data_ptr() for value in given}
        if is_new:  # neither a view nor in place
            self.bytes += outputs[0].numel() * outputs[0].element_size()
        if self.other is not None:
            sizes = self.other[len(self.calls)][1][len(given) :]
            grown = (
                find_axis(outputs[0], sizes[0], self.size, self.inner_default)
                if outputs and sizes
                else None
            )
            self.steps.append(TensorCall(function, tuple(axes), grown))
        self.calls.append((function, shapes + [value.shape for value in outputs]))
        return result


def find_axis(
    value: Tensor, shape: torch.Size, size: int, inner: bool | None = None
) -> Axis | None:
    """The axis of `value` that is larger than in `shape`. `value` has 2 x `size` examples, of which
    i and i + size are the same; `shape` has `size`.

    An axis may hold positions, too. Only several positions with different values show their order;
    else `inner` is the answer. Longer texts may have several positions where these have one.
    """
    if value.ndim != len(shape):
        raise Unhooked("the model computes differently for other batch sizes")
    grown = [
        dim
        for dim, (large, small) in enumerate(zip(value.shape, shape, strict=True))
        if large != small
    ]
    if not grown:
        return None
    if len(grown) > 1 or value.shape[grown[0]] != 2 * shape[grown[0]] or shape[grown[0]] % size:
        return MIXED
    rows = shape[grown[0]] // size
    if rows == 1:
        return Axis(grown[0], inner)
    # masks may hold -inf, equal in both runs
    values = torch.where(torch.isfinite(value), value, torch.zeros_like(value)).double()
    scale = float(values.abs().max()) if values.numel() else 0.0
    noise = 64 * torch.finfo(value.dtype).eps * scale if value.is_floating_point() else 0.0
    errors = []
    for axis in (Axis(grown[0]), Axis(grown[0], inner=True)):
        parts = axis.first(values, 2 * size)
        errors.append(float((parts[:size] - parts[size:]).abs().max()) if parts.numel() else 0.0)
    low, high = sorted(errors)
    if low > 1e-3 * scale:
        return MIXED
    return Axis(grown[0], errors[1] < errors[0] if high > 8 * low + noise else inner)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    for value in values.values() if isinstance(values, Mapping) else values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list | dict):
            yield from tensors_in(value)
