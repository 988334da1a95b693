"""From one batch to the gradients of each example, for every trained parameter of any nn.Module.

Capture has three ways. Layer rules compute all examples in one forward and one backward pass.
torch.func (vmap of the gradient) computes the parameters that no rule knows. Where neither is
right, plain autograd computes one example at a time. `probe` compares each way with the next on the
user's own model, before any work.

Letters: B examples.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from influence_cli.errors import is_out_of_memory
from influence_cli.gradients.autograd_gradients import (
    LossesAndGradients,
    gradients_by_autograd,
    gradients_by_torch_func,
)
from influence_cli.gradients.batches import (
    Batch,
    counts_examples,
    leaves,
    map_tensors,
    unlike_examples,
    without_tensors,
)
from influence_cli.gradients.example_axes import AxisPlan, Unhooked, make_plan
from influence_cli.gradients.form_ops import cheapest, smallest
from influence_cli.gradients.forms import Form
from influence_cli.gradients.hooks import AnyHooks, NewHooks, Past, hooks_for
from influence_cli.gradients.probe_checks import (
    check_eval_mode,
    check_not_random,
    described,
    unlike_losses,
)
from influence_cli.gradients.projection import Projection
from influence_cli.gradients.quantity import Quantity, checked, frozen
from influence_cli.gradients.tolerances import close, differing

Kept = TypeVar("Kept")  # what a caller makes of the gradients of one parameter
# (name of a parameter, its gradients) -> a result; the gradients may be overwritten afterwards
Keep = Callable[[str, Form], Kept]
# squared norms (B,), and the gradients where they are wanted
NormsAndForm = tuple[Tensor, Form | None]


@dataclass(frozen=True)
class Captured:
    """The gradients of B examples: the quantity (B,), and per parameter squared norms (B,) float64
    and, where they are wanted, the gradients.
    """

    losses: Tensor
    sqnorms: dict[str, Tensor]
    forms: dict[str, Form]


class Capture:
    """Captures the gradients of `quantity` in the parameters `names` of a model in eval mode.

    `embeddings`: parameters whose gradients may be few rows. `name`: what errors call the quantity.
    `note`: hears what the user should know. `projection`: applied to the gradients; without one,
    they keep their cheapest exact form.
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
        self.model, self.quantity, self.names = model, quantity, tuple(names)
        self.embeddings, self.name, self.projection = set(embeddings), name, projection
        self._note, self._noted = note, False
        # per tensor of a batch: whether its first axis counts the examples
        self._batched: list[bool] = []
        # whether whole batches are right; else one example at a time
        self.at_once = False
        # the parameters that rules compute; torch.func computes the others
        self.hooked: tuple[str, ...] = ()
        self.why_not_hooked: dict[str, str] = {}
        # the gradients of the probe's examples, in the form that capture returns
        self.sample: dict[str, Form] = {}
        self._plan = AxisPlan()

    @property
    def activations(self) -> float:
        """Bytes per example that a forward pass computes, 0 if unknown. A backward pass needs about
        as much.
        """
        return self._plan.activations

    @property
    def others(self) -> tuple[str, ...]:
        """The parameters that torch.func computes."""
        return tuple(name for name in self.names if name not in self.hooked)

    # ------------------------------------------------------------ choosing the way
    def probe(self, batch: Batch, singles: Sequence[Batch]) -> None:
        """Check the loss on a first batch and choose the way. `singles`: its examples, each
        collated as a batch of one.

        Raises GradientError: a scalar loss, a wrong length, a random loss, not differentiable.
        """
        size = len(singles)
        with frozen(self.model, self.names), torch.enable_grad():
            batch_losses = checked(self.name, self.quantity(self.model, batch), size).detach()
        alone = [self.single(single) for single in singles]
        check_eval_mode(self.model, self.name)
        check_not_random(self.single, singles[:1], alone[:1], self.name)
        if text := unlike_losses(self.name, batch_losses, torch.cat([one for one, _ in alone])):
            self._note(text)
        grads = {name: torch.stack([grads[name] for _, grads in alone]) for name in self.names}
        self.sample = {
            name: smallest(value, name in self.embeddings) for name, value in grads.items()
        }
        if size > 1:
            reason = self._why_not_at_once(batch, singles, alone)
            self.at_once = not reason
            if reason:
                self._note(
                    "influence computes gradients one example at a time, which is right but slow: "
                    f"torch.func can't batch this model ({reason})"
                )
        if self.projection:
            self.sample = {
                name: self.projection(name, form)[1] for name, form in self.sample.items()
            }

    @property
    def choice(self) -> dict[str, Any]:
        """What `probe` chose. Any: JSON values."""
        return {
            "at_once": self.at_once,
            "batched": self._batched,
            "hooked": list(self.hooked),
            "why_not_hooked": self.why_not_hooked,
        }

    def restore(self, choice: Mapping[str, Any], batch: Batch, singles: Sequence[Batch]) -> bool:
        """Take the choice of an earlier probe without comparing gradients; `sample` stays empty.
        False: the batch does not follow it. Raises GradientError: a random loss, train mode.
        """
        alone = [self.single(singles[0])]
        check_eval_mode(self.model, self.name)
        check_not_random(self.single, singles[:1], alone, self.name)
        self.at_once, self._batched = choice["at_once"], choice["batched"]
        self.hooked, self.why_not_hooked = tuple(choice["hooked"]), choice["why_not_hooked"]
        try:
            if self.at_once and self.hooked:
                self._plan = self._make_plan(batch, len(singles))
        except Unhooked:
            return False
        return True

    def _why_not_at_once(
        self, batch: Batch, singles: Sequence[Batch], alone: Sequence[LossesAndGradients]
    ) -> str:
        """Compare whole batches with single examples. Returns the reason where they differ."""
        tensors, single_tensors = leaves(batch), [leaves(single) for single in singles]
        if any(len(single) != len(tensors) for single in single_tensors):
            return "a batch of one has another structure"
        try:
            contents = without_tensors(batch)
            alike = all(bool(contents == without_tensors(single)) for single in singles)
        except Exception:  # objects that do not compare
            alike = False
        if not alike:
            return "batches hold more than tensors, and it differs between examples"
        self._batched = [
            counts_examples(tensor, len(singles)) and all(counts_examples(one, 1) for one in ones)
            for tensor, *ones in zip(tensors, *single_tensors, strict=True)
        ]
        expected = {name: torch.stack([grads[name] for _, grads in alone]) for name in self.names}
        losses = torch.cat([loss for loss, _ in alone])
        self._choose_hooked(batch, losses, expected)
        if not self.others:
            return ""
        try:
            batch_losses, grads = self._by_torch_func(batch, self.others)
        # whatever a model does that vmap can't do: the user reads it, and the other way is right
        except Exception as error:
            return described(error)
        if close(batch_losses, losses) and not differing(grads, expected):
            return ""
        return "its batched gradients differ from those of single examples"

    def _choose_hooked(self, batch: Batch, losses: Tensor, expected: dict[str, Tensor]) -> None:
        """Find the parameters for which rules and single examples agree. Keep the reason for each
        of the others.
        """
        new_hooks = hooks_for(len(losses), lambda name, form: cheapest(form))
        self.hooked = self.names
        while self.hooked:
            try:
                self._plan = self._make_plan(batch, len(losses))
                hooked_losses, hooks = self._by_rules(batch, len(losses), new_hooks)
                forms = hooks.captured
            except Past as past:
                wrong = dict.fromkeys(past.names, "it is used where no layer rule knows")
            # whatever a model does that hooks can't do: torch.func computes it then
            except Exception as error:
                wrong = dict.fromkeys(self.hooked, described(error))
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

    def _make_plan(self, batch: Batch, size: int) -> AxisPlan:
        """The plan of a batch, from two of its examples and the same two twice. They are those
        that differ most, so that a mask that one of them needs is in the plan.
        """
        at = unlike_examples(leaves(batch), self._batched, size)
        sample_size = len(at)
        flags = iter(self._batched * 2)
        two = map_tensors(lambda tensor: tensor[at] if next(flags) else tensor, batch)
        twice = map_tensors(
            lambda tensor: torch.cat([tensor, tensor]) if next(flags) else tensor, two
        )
        with frozen(self.model, self.names), torch.enable_grad():
            return make_plan(
                lambda examples: self.quantity(self.model, examples), two, twice, sample_size
            )

    # ------------------------------------------------------------ capturing
    def __call__(
        self, batch: Batch, singles: Callable[[int], Batch], size: int, values: bool = True
    ) -> Captured:
        """The gradients of a batch of `size`. `singles(i)`: example i as a batch of one. `values`
        False: norms and losses only.
        """
        losses, results = self.visit(batch, singles, size, self.norms_and_form(values))
        sqnorms = {name: results[name][0] for name in self.names}
        forms = {name: form for name in self.names if (form := results[name][1]) is not None}
        return Captured(losses, sqnorms, forms)

    def visit(
        self, batch: Batch, singles: Callable[[int], Batch], size: int, keep: Keep[Kept]
    ) -> tuple[Tensor, dict[str, Kept]]:
        """Losses (B,) float64, and what `keep` makes of each parameter's gradients, while the
        backward pass runs. A parameter may come twice; its last result counts.
        """
        visited = self._batch(batch, size, keep) if self.at_once else None
        if visited is None:
            parts = [self.single(singles(i)) for i in range(size)]
            grads = {name: torch.stack([part[name] for _, part in parts]) for name in self.names}
            visited = torch.cat([loss for loss, _ in parts]), self._results_of(grads, keep)
        losses, results = visited
        return losses.cpu().double() if losses.device.type == "mps" else losses.double(), results

    def _results_of(self, grads: dict[str, Tensor], keep: Keep[Kept]) -> dict[str, Kept]:
        return {
            name: keep(name, smallest(value, name in self.embeddings))
            for name, value in grads.items()
        }

    def norms_and_form(self, values: bool = True) -> Keep[NormsAndForm]:
        """Keep exact squared norms (B,) and, with `values`, the gradients, projected or in their
        cheapest form.
        """

        def keep(name: str, form: Form) -> NormsAndForm:
            if form.device.type == "mps":  # no float64 there
                form = form.to(torch.device("cpu"))
            if not values:
                return form.sqnorm(), None
            if self.projection:
                return self.projection(name, form)
            form = cheapest(form)
            return form.sqnorm(), form

        return keep

    def _batch(
        self, batch: Batch, size: int, keep: Keep[Kept]
    ) -> tuple[Tensor, dict[str, Kept]] | None:
        """All examples at once. None, and a note, where this batch does not allow it."""
        try:
            visited = self.run_rules(batch, size, hooks_for(size, keep))
            results = visited[1].captured if visited is not None else {}
            others = [name for name in self.names if name not in results]
            if others or visited is None:
                losses, grads = self._by_torch_func(batch, others)
                return losses, results | self._results_of(grads, keep)
            return visited[0], results
        except Exception as error:  # a batch unlike the first: another length, another branch
            if is_out_of_memory(error):
                raise
            if not self._noted:
                self._note(
                    "influence computes some batches one example at a time, which is right but "
                    f"slow ({described(error)})"
                )
            self._noted = True
            return None

    def run_rules(
        self, batch: Batch, size: int, new_hooks: NewHooks[AnyHooks]
    ) -> tuple[Tensor, AnyHooks] | None:
        """The losses of a batch, and the hooks that followed it. A batch whose operations differ
        from the plan gets its own plan. None where that fails, too.
        """
        for _ in range(2 if self.hooked else 0):
            try:
                return self._by_rules(batch, size, new_hooks)
            except Unhooked:
                try:
                    self._plan = self._make_plan(batch, size)
                except Unhooked:
                    break
        return None

    def _by_rules(
        self, batch: Batch, size: int, new_hooks: NewHooks[AnyHooks]
    ) -> tuple[Tensor, AnyHooks]:
        parameters = dict(self.model.named_parameters())
        with frozen(self.model, self.hooked), torch.enable_grad():
            hooks = new_hooks(self._plan, {name: parameters[name] for name in self.hooked})
            with hooks:
                losses = self.quantity(self.model, batch)
            hooks.finish(checked(self.name, losses, size, traced=True))
        return losses.detach(), hooks

    def _by_torch_func(self, batch: Batch, names: Sequence[str]) -> LossesAndGradients:
        return gradients_by_torch_func(
            self.model, self.quantity, names, self.name, batch, self._batched
        )

    def single(self, batch: Batch) -> LossesAndGradients:
        """The loss and the gradients of a batch of one, by plain autograd."""
        return gradients_by_autograd(self.model, self.quantity, self.names, self.name, batch)
