"""One batch -> per-example gradients of every trained parameter, right for any nn.Module.

Three ways, each checked against the last on the user's own model before any work: by hooks, all
examples in one forward and backward, for the parameters that a rule knows; by torch.func (vmap of
grad) for the others; one example at a time by plain autograd where nothing else is right.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from influence_cli.errors import GradientError, is_out_of_memory, listed
from influence_cli.gradients.batches import leaves, map_tensors, without_tensors
from influence_cli.gradients.example_axes import AxisPlan, Unhooked, make_plan
from influence_cli.gradients.form_ops import cheapest, smallest
from influence_cli.gradients.forms import Form
from influence_cli.gradients.hooks import Hooks, Past
from influence_cli.gradients.projection import Projection

Quantity = Callable[[nn.Module, Any], Tensor]  # (model, batch) -> (B,), smaller is better


@dataclass(frozen=True)
class Captured:
    """B examples: quantity (B,), per parameter squared norms (B,) float64, and the gradients where
    they were asked for.
    """

    losses: Tensor
    sqnorms: dict[str, Tensor]
    forms: dict[str, Form]


class Capture:
    """Captures gradients of `quantity` with respect to the parameters `names` of a model in eval
    mode.

    `name` is what errors call the quantity; `note` hears what the user should know. The way (all at
    once, or one by one) is settled by `probe` before any work, on fixed examples. `projection`:
    what is kept of gradients, in place of their cheapest exact form.
    """

    def __init__(
        self,
        model: nn.Module,
        quantity: Quantity,
        names: Sequence[str],
        embeddings: Sequence[str] = (),
        name: str = "loss()",
        note: Callable[[str], None] = lambda message: None,
        projection: Projection | None = None,
    ) -> None:
        self.model, self.quantity, self.names, self.embeddings, self.name = (
            model,
            quantity,
            tuple(names),
            set(embeddings),
            name,
        )
        self.projection = projection
        self._note, self._noted = note, False
        self._batched: list[
            bool
        ] = []  # per tensor of a batch: whether its leading axis is the examples
        self.at_once = False  # batches are taken as such; else one example at a time
        self.hooked: tuple[
            str, ...
        ] = ()  # parameters whose gradients the hooks take; torch.func takes the others
        self.why_not_hooked: dict[str, str] = {}
        self.sample: dict[str, Form] = {}  # the gradients of the probe's examples, as they are kept
        self._plan = AxisPlan()

    @property
    def activations(self) -> float:
        """Bytes per example of what a forward pass computes, where that is known; a backward pass
        needs about as much.
        """
        return self._plan.activations

    @property
    def others(self) -> tuple[str, ...]:
        """Parameters that torch.func takes."""
        return tuple(name for name in self.names if name not in self.hooked)

    # ------------------------------------------------------------ settling the way
    def probe(self, batch: Any, singles: Sequence[Any]) -> None:
        """Check the loss on a first batch and settle the way; `singles` are its examples, each
        collated alone.

        Raises GradientError: scalar loss, wrong length, not differentiable.
        """
        size = len(singles)
        with frozen(self.model, self.names), torch.enable_grad():
            together = checked(self.name, self.quantity(self.model, batch), size).detach()
        alone = [self.single(single) for single in singles]
        self._check_repeats(singles, alone)
        single_losses = torch.cat([loss for loss, _ in alone])
        if not close(together, single_losses):
            worst = int((together - single_losses).abs().argmax())
            self._note(
                f"{self.name} of example {worst} is {single_losses[worst]:.6g} alone and "
                f"{together[worst]:.6g} in a batch: examples influence "
                "each other (batch statistics? padding that is not masked?), so gradients depend "
                "on how examples are batched"
            )
        self.sample = {
            name: smallest(
                torch.stack([grads[name] for _, grads in alone]), name in self.embeddings
            )
            for name in self.names
        }
        if size > 1:
            why = self._why_not_at_once(batch, singles, alone)
            self.at_once = not why
            if why:
                self._note(
                    "gradients are taken one example at a time, right but slow: torch.func can't "
                    f"batch this model ({why})"
                )
        if self.projection:
            self.sample = {
                name: self.projection(name, form)[1] for name, form in self.sample.items()
            }

    def _check_repeats(
        self, singles: Sequence[Any], alone: Sequence[tuple[Tensor, dict[str, Tensor]]]
    ) -> None:
        """Raise GradientError where the same example gives another gradient the second time, or the
        model has left eval mode.
        """
        training = [
            name or "the model" for name, module in self.model.named_modules() if module.training
        ]
        if training:
            raise GradientError(
                f"{self.name} switched {listed(training)} to train mode",
                "expected: the model stays in eval mode, where an example has a gradient of its "
                "own",
                "take .train() out of it; dropout and batch statistics have no place here",
            )
        for i, single in enumerate(singles):
            loss, grads = self.single(single)
            if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads.values())):
                continue  # said with its checkpoint when it is captured
            if not close(loss, alone[i][0]) or differing(grads, alone[i][1]):
                raise GradientError(
                    f"{self.name} of example {i} is random: {float(alone[i][0][0]):.6g}, and "
                    f"{float(loss[0]):.6g} when taken again",
                    "expected: the same loss and gradient each time",
                    "look for functional dropout (F.dropout needs training=self.training), noise "
                    "or sampling",
                )

    def _why_not_at_once(
        self, batch: Any, singles: Sequence[Any], alone: Sequence[tuple[Tensor, dict[str, Tensor]]]
    ) -> str:
        """Try the batched way against the single one; empty where they agree."""
        size, first = len(singles), leaves(singles[0])
        if len(leaves(batch)) != len(first):
            return "a batch of one has another structure"
        try:
            alike = all(
                bool(without_tensors(batch) == without_tensors(single)) for single in singles
            )
        except Exception:  # things that can't be compared
            alike = False
        if not alike:
            return "batches hold more than tensors, and it differs between examples"
        self._batched = [
            is_batched(tensor, size) and is_batched(one, 1)
            for tensor, one in zip(leaves(batch), first, strict=True)
        ]
        expected = {name: torch.stack([single[name] for _, single in alone]) for name in self.names}
        losses = torch.cat([loss for loss, _ in alone])
        self._settle_hooks(batch, losses, expected)
        if not self.others:
            return ""
        try:
            batch_losses, grads = self._at_once(batch, self.others)
        # whatever a model does that vmap can't; the user hears of it, and the other way is right
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if close(batch_losses, losses) and not differing(grads, expected):
            return ""
        return "its batched gradients differ from those of single examples"

    def _settle_hooks(self, batch: Any, losses: Tensor, expected: dict[str, Tensor]) -> None:
        """Find the parameters whose gradients by hooks are those of single examples; the others are
        left, with the reason.
        """
        self.hooked = self.names
        while self.hooked:
            try:
                self._plan = self._make_plan(batch, len(losses))
                hooked_losses, forms = self._by_hooks(
                    batch, len(losses), lambda name, form: cheapest(form)
                )
            except Past as past:
                wrong = dict.fromkeys(past.names, "it is used where no layer rule knows")
            except (
                Exception
            ) as error:  # whatever a model does that hooks can't; torch.func takes it then
                wrong = dict.fromkeys(
                    self.hooked, f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
                )
            else:
                grads = {
                    name: form.dense().values.view_as(expected[name])
                    for name, form in forms.items()
                }
                unlike = differing(grads, expected) if close(hooked_losses, losses) else self.hooked
                wrong = dict.fromkeys(unlike, "its rule disagrees with autograd")
                if not wrong:
                    self.sample |= forms
                    return
            self.why_not_hooked |= wrong
            self.hooked = tuple(name for name in self.hooked if name not in wrong)

    def _make_plan(self, batch: Any, size: int) -> AxisPlan:
        """From at most two examples of a batch, and the same twice."""
        sample_size = min(2, size)
        flags = iter(self._batched * 2)
        two = map_tensors(lambda tensor: tensor[:sample_size] if next(flags) else tensor, batch)
        twice = map_tensors(
            lambda tensor: torch.cat([tensor, tensor]) if next(flags) else tensor, two
        )
        with frozen(self.model, self.names), torch.enable_grad():
            return make_plan(
                lambda examples: self.quantity(self.model, examples), two, twice, sample_size
            )

    # ------------------------------------------------------------ capturing
    def __call__(
        self, batch: Any, singles: Callable[[int], Any], size: int, values: bool = True
    ) -> Captured:
        """Gradients of a batch of `size`. `singles(i)`: example i collated alone. `values` False:
        norms and losses only.
        """
        batched = self._batch(batch, size, values) if self.at_once else None
        if batched is None:
            parts = [self.single(singles(i)) for i in range(size)]
            grads = {name: torch.stack([part[name] for _, part in parts]) for name in self.names}
            batched = torch.cat([loss for loss, _ in parts]), self._measured(grads, values)
        losses, forms = batched
        losses = losses.cpu().double() if losses.device.type == "mps" else losses.double()
        sqnorms = {name: forms[name][0] for name in self.names}
        return Captured(
            losses,
            sqnorms,
            {name: form for name in self.names if (form := forms[name][1]) is not None},
        )

    def _measured(self, grads: dict[str, Tensor], values: bool) -> dict[str, "Measured"]:
        return {
            name: self._kept(name, smallest(value, name in self.embeddings), values)
            for name, value in grads.items()
        }

    def _kept(self, name: str, form: Form, values: bool) -> "Measured":
        """Squared norms (B,), exact whatever is kept, and the gradients where they are: in the
        cheapest exact form, or projected.
        """
        if form.device.type == "mps":  # no float64 there
            form = form.to(torch.device("cpu"))
        if not values:
            return form.sqnorm(), None
        if self.projection:
            return self.projection(name, form)
        form = cheapest(form)
        return form.sqnorm(), form

    def _batch(
        self, batch: Any, size: int, values: bool
    ) -> tuple[Tensor, dict[str, "Measured"]] | None:
        """Losses and gradients of all examples at once; None where this batch can't be taken so,
        which is said.
        """
        try:
            losses, forms = self._hooked_batch(batch, size, values)
            others = [name for name in self.names if name not in forms]
            if others or losses is None:
                losses, grads = self._at_once(batch, others)
                forms |= self._measured(grads, values)
            return losses, forms
        except Exception as error:  # a batch unlike the first: another length, another branch
            if is_out_of_memory(error):
                raise
            if not self._noted:
                self._note(
                    "some batches are taken one example at a time, right but slow "
                    f"({type(error).__name__}: {str(error)[:100]})"
                )
            self._noted = True
            return None

    def _hooked_batch(
        self, batch: Any, size: int, values: bool
    ) -> tuple[Tensor | None, dict[str, "Measured"]]:
        """By hooks; a batch that computes otherwise than the plan gets a plan of its own, and
        nothing is found where that fails too.
        """
        for _ in range(2 if self.hooked else 0):
            try:
                return self._by_hooks(
                    batch, size, lambda name, form: self._kept(name, form, values)
                )
            except Unhooked:
                try:
                    self._plan = self._make_plan(batch, size)
                except Unhooked:
                    break
        return None, {}

    def _by_hooks(
        self, batch: Any, size: int, keep: Callable[[str, Form], Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        parameters = dict(self.model.named_parameters())
        with frozen(self.model, self.hooked), torch.enable_grad():
            hooks = Hooks(self._plan, {name: parameters[name] for name in self.hooked}, size, keep)
            with hooks:
                losses = self.quantity(self.model, batch)
            hooks.finish(checked(self.name, losses, size, traced=True))
        return losses.detach(), hooks.captured

    def _at_once(self, batch: Any, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """vmap over the examples of the gradient at a batch of one; tensors without an axis of
        examples are shared.
        """
        tensors = leaves(batch)
        mapped = [tensor for tensor, batched in zip(tensors, self._batched, strict=True) if batched]
        wrapper = _Call(self.model, self.quantity)
        parameters = dict(self.model.named_parameters())
        theta = {name: parameters[name].detach() for name in names}
        name_of = {id(parameters[name]): name for name in names}
        # every place of each parameter once: functional_call's own tying does not restore a module
        # that is held twice
        places = {
            f"model.{path}.{attribute}".replace("..", "."): name_of[id(parameter)]
            for path, module in self.model.named_modules()
            for attribute, parameter in module.named_parameters(
                recurse=False, remove_duplicate=False
            )
            if id(parameter) in name_of
        }

        def loss_of_one(theta: dict[str, Tensor], *one: Tensor) -> Tensor:
            examples, batched = iter(one), iter(self._batched)
            alone = map_tensors(
                lambda tensor: next(examples).unsqueeze(0) if next(batched) else tensor, batch
            )
            placed = {place: theta[name] for place, name in places.items()}
            return checked(
                self.name,
                functional_call(wrapper, placed, (alone,), tie_weights=False),
                1,
                traced=True,
            ).sum()

        with frozen(self.model, self.names):
            grads, losses = vmap(grad_and_value(loss_of_one), in_dims=(None, *[0] * len(mapped)))(
                theta, *mapped
            )
        return losses.detach(), {name: grads[name].detach() for name in names}

    def single(self, batch: Any, size: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
        """Plain autograd on a batch of one, or the gradient of a batch's summed loss; of a
        parameter that it does not reach, zero.
        """
        parameters = dict(self.model.named_parameters())
        theta = [parameters[name] for name in self.names]
        with frozen(self.model, self.names), torch.enable_grad():
            losses = checked(self.name, self.quantity(self.model, batch), size)
            grads = torch.autograd.grad(losses.sum(), theta, allow_unused=True)
        dense = [
            torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
            for p, g in zip(theta, grads, strict=True)
        ]
        return losses.detach(), {
            name: value.detach() for name, value in zip(self.names, dense, strict=True)
        }


@contextmanager
def frozen(model: nn.Module, but: Sequence[str] = ()) -> Iterator[None]:
    """Quiet, and no autograd tape for any parameter but these."""
    others = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and name not in set(but)
    ]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        with quiet():
            yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def checked(name: str, losses: Any, size: int, traced: bool = False) -> Tensor:
    """`losses` if it is one differentiable number per example, else a GradientError. `traced`:
    inside torch.func.
    """
    expected = f"expected: a tensor of shape ({size},), one unreduced loss per example of the batch"
    if not isinstance(losses, Tensor):
        raise GradientError(f"{name} returned a {type(losses).__name__}", expected)
    if losses.ndim == 0:
        raise GradientError(
            f"{name} returned a scalar", expected, "for torch's losses: reduction='none'"
        )
    if tuple(losses.shape) != (size,):
        raise GradientError(
            f"{name} returned shape {tuple(losses.shape)} for a batch of {size}",
            expected,
            "sum or average over positions, never over examples: .mean(1), .flatten(1).sum(1)",
        )
    if not losses.is_floating_point():
        raise GradientError(f"{name} returned {losses.dtype}", expected)
    if not traced and not losses.requires_grad:
        raise GradientError(
            f"{name} returned a tensor that is not differentiable",
            "expected: a tensor that depends on the model's trained parameters",
            "look for torch.no_grad(), .detach(), .item(), .argmax() or another model than the one "
            "passed in",
        )
    return losses


Measured = tuple[Tensor, Form | None]  # squared norms (B,), and the gradients where they are kept


class _Call(nn.Module):
    """quantity(model, batch) as a module, so that functional_call can swap the parameters of
    `model`.
    """

    def __init__(self, model: nn.Module, quantity: Quantity) -> None:
        super().__init__()
        self.model, self._quantity = model, quantity

    def forward(self, batch: Any) -> Any:
        return self._quantity(self.model, batch)


def is_batched(tensor: Tensor, size: int) -> bool:
    return tensor.ndim > 0 and len(tensor) == size


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to compute one number may be apart, relative: the square root of the
    precision, or 8 units of half precisions.
    """
    eps = torch.finfo(dtype).eps
    return eps**0.5 if eps < 1e-6 else 8 * eps


def close(computed: Tensor, expected: Tensor) -> bool:
    """Equal within the rounding between two ways to compute one number."""
    eps = rounding(expected.dtype)
    return torch.allclose(computed, expected, rtol=eps, atol=eps)


def differing(computed: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """The parameters of `found` whose gradients are not those expected within rounding, relative to
    the largest of the parameter.

    Where a gradient is zero but for rounding (an attention key's bias) that is noise: as much of
    the largest of all parameters is allowed.
    """
    scales = {
        name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()
    }
    largest = max(scales.values(), default=0.0)
    allowed = {
        name: max(
            rounding(value.dtype) * scales[name], torch.finfo(value.dtype).eps ** 0.75 * largest
        )
        for name, value in computed.items()
    }
    return [
        name
        for name, value in computed.items()
        if not bool(((value - expected[name]).abs() <= allowed[name]).all())
    ]


@contextmanager
def quiet() -> Iterator[None]:
    """Fused attention paths off (they skip autograd's rules), restored after; vmap's note on slow
    rules left out.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="There is a performance drop because we have not yet implemented"
            )
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
