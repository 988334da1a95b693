"""Gradients of word embeddings at the output of an embedding module.

They follow the input path alone, even if the weight is tied to another layer. Each example has one
row per distinct token w: G_w = sum over the positions of w of dl/de (TracIn-WE, Yeh et al. 2022,
arXiv:2202.11844, section 4). Padding has no row: the module's padding_idx, and positions that the
batch's `attention_mask` excludes.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError, is_out_of_memory
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.capture import Captured, Keep, Kept, NormsAndForm
from influence_cli.gradients.form_ops import concat, distance, merged
from influence_cli.gradients.forms import Form
from influence_cli.gradients.layer_rules import embedding
from influence_cli.gradients.probe_checks import random_quantity
from influence_cli.gradients.quantity import Quantity, checked, frozen
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.gradients.tolerances import close, rounding

MASK = "attention_mask"  # of a batch that is a mapping: 0 where a position is padding


class EmbeddingCapture:
    """Captures `column`: the gradients of `quantity` at the output of the embedding module named
    `module`, by token.
    """

    def __init__(
        self,
        model: nn.Module,
        quantity: Quantity,
        column: str,
        module: str,
        name: str = "loss()",
        note: Callable[[str], None] = lambda message: None,
    ) -> None:
        embedding = model.get_submodule(module)
        assert isinstance(embedding, nn.Embedding)
        self.model, self.quantity, self.name = model, quantity, name
        self.column, self.module = column, embedding
        self._place, self._note = module or "the model", note
        self.at_once, self.activations = False, 0.0
        self.sample: dict[str, Form] = {}
        self._axis = 0  # the axis of the token ids that counts examples

    def probe(self, batch: Batch, singles: Sequence[Batch]) -> None:
        """Choose whether to compute whole batches: if they agree with their examples alone.

        Raises GradientError: the model does not call the module, or passes it no token ids, or ids
        past its vocabulary.
        """
        size = len(singles)
        alone = [self._gradients(single, 1) for single in singles]
        again = [self._gradients(single, 1) for single in singles]
        for (losses, rows), (losses_again, rows_again) in zip(alone, again, strict=True):
            if not close(losses, losses_again) or not alike(rows, rows_again):
                raise random_quantity(self.name, float(losses), float(losses_again))
        self.sample = {self.column: Postings.of(alone[0][1])}
        if size < 2:
            return
        expected, losses = (
            concat([rows for _, rows in alone]),
            torch.cat([losses for losses, _ in alone]),
        )
        for self._axis in (0, 1):
            try:
                batched, rows = self._gradients(batch, size)
            except GradientError:
                raise
            except Exception as error:  # whatever a model does with a batch: one by one is right
                if is_out_of_memory(error):
                    raise
                continue
            self.at_once = close(batched, losses) and alike(rows, expected)
            if self.at_once:
                self.sample = {self.column: Postings.of(rows)}
                return
        self._axis = 0
        self._note(
            "influence computes gradients one example at a time, which is right but slow: a batch "
            "and its examples alone give different gradients"
        )

    @property
    def choice(self) -> dict[str, Any]:
        """What `probe` chose. Any: JSON values."""
        return {"at_once": self.at_once, "axis": self._axis}

    def restore(self, choice: Mapping[str, Any], batch: Batch, singles: Sequence[Batch]) -> bool:
        """Take the choice of an earlier probe; `sample` stays empty. Raises GradientError: a random
        loss, and as `probe` does.
        """
        (losses, rows), (losses_again, rows_again) = (
            self._gradients(singles[0], 1) for _ in range(2)
        )
        if not close(losses, losses_again) or not alike(rows, rows_again):
            raise random_quantity(self.name, float(losses), float(losses_again))
        self.at_once, self._axis = choice["at_once"], choice["axis"]
        return True

    def __call__(
        self, batch: Batch, singles: Callable[[int], Batch], size: int, values: bool = True
    ) -> Captured:
        """The gradients of a batch of `size`. `singles(i)`: example i as a batch of one. `values`
        False: norms and losses only.
        """
        losses, results = self.visit(batch, singles, size, self.norms_and_form(values))
        norms, form = results[self.column]
        return Captured(losses, {self.column: norms}, {self.column: form} if form else {})

    def visit(
        self, batch: Batch, singles: Callable[[int], Batch], size: int, keep: Keep[Kept]
    ) -> tuple[Tensor, dict[str, Kept]]:
        """Losses (B,) float64, and what `keep` makes of the gradients."""
        batched = self._batch(batch, size) if self.at_once else None
        if batched is None:
            parts = [self._gradients(singles(i), 1) for i in range(size)]
            batched = torch.cat([loss for loss, _ in parts]), concat([part for _, part in parts])
        losses, rows = batched
        return losses.double(), {self.column: keep(self.column, rows)}

    def norms_and_form(self, values: bool = True) -> Keep[NormsAndForm]:
        """Keep squared norms (B,) and, with `values`, the rows."""
        return lambda name, rows: (rows.sqnorm(), rows if values else None)

    def _batch(self, batch: Batch, size: int) -> tuple[Tensor, Form] | None:
        """All examples at once. None, and a note, where this batch does not allow it."""
        try:
            return self._gradients(batch, size)
        except Exception as error:  # a batch unlike the first
            if isinstance(error, GradientError) or is_out_of_memory(error):
                raise
            self._note(
                "influence computes some batches one example at a time, which is right but slow "
                f"({type(error).__name__}: {str(error)[:100]})"
            )
            return None

    def _gradients(self, batch: Batch, size: int) -> tuple[Tensor, EmbeddingRows]:
        """Losses (size,), and each example's rows, summed over the calls of the module."""
        calls: list[tuple[Tensor, Tensor]] = []

        def cut_output(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
            ids, output = args[0].detach(), output.detach().requires_grad_()
            calls.append((ids[None] if ids.ndim == 0 else ids, output))
            return output

        with (
            frozen(self.model),
            torch.enable_grad(),
            module_hooks(self.module, lambda module, args: self._check_ids(args), cut_output),
        ):
            losses = self.quantity(self.model, batch)
            if not calls:
                raise GradientError(
                    f"{self.name} never calls the embedding {self._place}",
                    "expected: token ids go through it on their way to the loss",
                    "--embedding NAME chooses another one",
                )
            losses = checked(self.name, losses, size, traced=True)
            outputs = [output for _, output in calls]
            grads = (
                torch.autograd.grad(losses.sum(), outputs, allow_unused=True)
                if losses.requires_grad
                else [None] * len(outputs)
            )
        parts: list[Form] = [
            self._rows(ids, grad, size, mask_of(batch, ids))
            for (ids, _), grad in zip(calls, grads, strict=True)
            if grad is not None
        ]
        if not parts:
            raise GradientError(
                f"{self.name} does not depend on the output of the embedding {self._place}",
                "--embedding NAME chooses another",
            )
        rows = functools.reduce(merged, parts)
        assert isinstance(rows, EmbeddingRows)
        return losses.detach(), rows

    def _rows(self, ids: Tensor, grad: Tensor, size: int, mask: Tensor | None) -> EmbeddingRows:
        if size == 1:  # whatever their axes are, all positions are its own
            axis, ids, grad, mask = (
                0,
                ids.reshape(1, -1),
                grad.reshape(1, -1, grad.shape[-1]),
                mask if mask is None else mask.reshape(1, -1),
            )
        else:
            axis = self._axis
        if ids.shape[axis] != size:
            raise ValueError(f"token ids of shape {tuple(ids.shape)} for {size} examples")
        if mask is not None:
            grad = grad * mask.to(grad.dtype)[..., None]
        call = {"weight": self.module.weight.detach(), "padding_idx": self.module.padding_idx}
        rows = embedding(call, ids.movedim(axis, 0), grad.movedim(axis, 0))["weight"]
        assert isinstance(rows, EmbeddingRows)
        return rows if mask is None else without_zeros(rows)

    def _check_ids(self, args: tuple[Any, ...]) -> None:  # whatever the model passes
        """Raise GradientError unless the embedding gets token ids of its vocabulary."""
        ids, tokens = args[0] if args else None, self.module.num_embeddings
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            passed = (
                f"{ids.dtype} of shape {tuple(ids.shape)}"
                if isinstance(ids, Tensor)
                else type(ids).__name__
            )
            raise GradientError(
                f"the model passes {passed} to the embedding {self._place}",
                "expected: token ids, a tensor of whole numbers",
                "convert the batch's ids with .long()",
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
            wrong = int(ids.max()) if int(ids.max()) >= tokens else int(ids.min())
            raise GradientError(
                f"the embedding {self._place} is given token {wrong}, which is past its vocabulary",
                f"expected: ids from 0 to {tokens - 1:,}",
                "check that tokenizer and model have the same vocabulary",
            )


@contextmanager
def module_hooks(
    module: nn.Module, before: Callable[..., None], after: Callable[..., Tensor]
) -> Iterator[None]:
    """Call `before(module, args)` and `after(module, args, output)` around the module."""
    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mask_of(batch: Batch, ids: Tensor) -> Tensor | None:
    """The batch's attention mask, if it has the shape of these ids."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None


def without_zeros(rows: EmbeddingRows) -> EmbeddingRows:
    """Drop the rows to which no position contributed."""
    kept = (rows.values != 0).any(1)
    counts = torch.zeros(len(rows), dtype=torch.int64, device=kept.device).index_add_(
        0, rows.example[kept], kept[kept].long()
    )
    return EmbeddingRows(
        rows.shape,
        rows.ids[kept],
        rows.values[kept],
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
    )


def alike(computed: Form, expected: Form) -> bool:
    """Whether the gradients agree within rounding, relative to the largest."""
    largest = float(expected.sqnorm().max().sqrt())
    return bool(
        (
            distance(computed, expected)
            <= rounding(torch.float32 if largest == 0 else expected.dtype) * largest
        ).all()
    )
