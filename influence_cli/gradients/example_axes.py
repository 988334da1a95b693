"""Which axis of each tensor of a forward pass is the examples: found by running two examples, and
the same two twice.

The axis that doubles is theirs. The plan lists the calls of torch functions in their order, for
hooks.py to follow.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from influence_cli.gradients.batches import Batch


class Unhooked(Exception):
    """The hooks can't take this batch: its operations are not those of the plan, or some gradient
    came past them.
    """


@dataclass(frozen=True)
class Axis:
    """Which axis of a tensor is the examples, `inner` where it holds other positions too and the
    example varies fastest; None: unknown.
    """

    dim: int
    inner: bool | None = False

    def tells(self, rows: int, size: int) -> bool:
        """Whether `rows` along the axis can be told apart into `size` examples."""
        return rows == size or (self.inner is not None and rows % size == 0)

    def first(self, value: Tensor, size: int) -> Tensor:
        """(B, m, ...): the examples first, then what else their axis holds."""
        if value.shape[self.dim] == size:
            return value.movedim(self.dim, 0).unsqueeze(1)
        if not self.tells(value.shape[self.dim], size):
            raise Unhooked(f"an axis of {value.shape[self.dim]} for {size} examples")
        rows = value.shape[self.dim] // size
        parts = value.movedim(self.dim, 0).unflatten(
            0, (rows, size) if self.inner else (size, rows)
        )
        return parts.transpose(0, 1) if self.inner else parts


MIXED = Axis(-1)  # several axes grow with the examples: a product of examples with each other


@dataclass(frozen=True)
class TensorCall:
    """One call of a torch function: the axes of its tensors (None: one for all examples), and of
    its first result.
    """

    function: Callable[..., Any]
    axes: tuple[Axis | None, ...]
    result: Axis | None


@dataclass(frozen=True)
class AxisPlan:
    """The calls of a batch, in order. `activations`: bytes per example of what they compute."""

    steps: tuple[TensorCall, ...] = ()
    activations: float = 0.0


def make_plan(forward: Callable[[Batch], Any], two: Batch, twice: Batch, size: int) -> AxisPlan:
    """The plan of `forward`, from a batch of `size` examples and one of the same examples twice.

    Raises Unhooked where the two runs differ in more than sizes.
    """
    single, double = Recorder(), Recorder()
    with single:
        forward(two)
    double.other, double.size = single.calls, size
    with double:
        forward(twice)
    if len(double.calls) != len(single.calls):
        raise Unhooked("the model computes differently for other batch sizes")
    return AxisPlan(tuple(double.steps), (double.bytes - single.bytes) / size)


class Watcher(TorchFunctionMode):
    """Sees each call of a torch function. What attention does inside one such call is seen too."""

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
        if getattr(function, "__name__", "") in ("__get__", "__set__"):
            return function(*args, **kwargs)
        return self.seen(function, args, kwargs)

    def attention(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its projections are calls of F.linear, made where no mode reaches: by the name in
        torch.nn.functional, restored after.
        """
        plain = F.linear
        F.linear = lambda *a, **k: self.seen(plain, a, k)
        try:
            return function(*args, **kwargs)
        finally:
            F.linear = plain

    def seen(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        raise AssertionError("subclasses say what they do")


class Recorder(Watcher):
    """Keeps the shapes of every call; in the second run, beside `other`, the axes that grew with
    the examples.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[torch.Size]]] = []
        self.other: list[tuple[Any, list[torch.Size]]] | None = None
        self.steps: list[TensorCall] = []
        self.size, self.bytes = 0, 0
        self.untold: bool | None = (
            None  # how an axis holds examples and positions where its values don't tell
        )

    def attention(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Its last projection reads (L * B, E), the examples inside, whose rows are alike for a
        single key.
        """
        query = kwargs["query"] if "query" in kwargs else args[0]
        self.untold = True if query.ndim == 3 and query.shape[1] == 2 * self.size else None
        try:
            return super().attention(function, args, kwargs)
        finally:
            self.untold = None

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
                find_axis(value, shape, self.size, self.untold)
                for value, shape in zip(given, sizes, strict=False)
            ]
        result = function(*args, **kwargs)
        outputs = [value.detach() for value in tensors_in((result,))][:1]
        if outputs and outputs[0].data_ptr() not in {
            value.data_ptr() for value in given
        }:  # neither a view nor in place
            self.bytes += outputs[0].numel() * outputs[0].element_size()
        if self.other is not None:
            sizes = self.other[len(self.calls)][1][len(given) :]
            grown = (
                find_axis(outputs[0], sizes[0], self.size, self.untold)
                if outputs and sizes
                else None
            )
            self.steps.append(TensorCall(function, tuple(axes), grown))
        self.calls.append((function, shapes + [value.shape for value in outputs]))
        return result


def find_axis(
    value: Tensor, shape: torch.Size, size: int, inner: bool | None = None
) -> Axis | None:
    """The axis of `value`, of 2 x `size` examples, that is larger than in `shape`, of `size`;
    examples i and i + size are the same.

    How an axis holds examples and positions shows only where there are several, unlike each other;
    else `inner` says it. A batch of longer texts may have several where this one has not.
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
    values = torch.where(
        torch.isfinite(value), value, torch.zeros_like(value)
    ).double()  # masks may hold -inf, the same in both
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
