"""Gradients of word embeddings, taken at an embedding module's output: the input path alone,
whatever else its weight is tied to.

Per example one row for each distinct token: G_w = sum over the positions of w of dl/de (TracIn-WE,
Yeh et al. 2022, arXiv:2202.11844, section 4). Padding has none: the module's padding_idx, and
positions that an `attention_mask` of the batch leaves out.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError, is_out_of_memory
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.capture import Captured
from influence_cli.gradients.form_ops import concat, distance, merged
from influence_cli.gradients.forms import Form
from influence_cli.gradients.layer_rules import embedding
from influence_cli.gradients.probe_checks import random_quantity
from influence_cli.gradients.quantity import Quantity, checked, frozen
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.gradients.tolerances import close, rounding

MASK = "attention_mask"  # of a batch that is a mapping: 0 where a position is padding


class EmbeddingCapture:
    """Captures `column`: the gradient of `quantity` at the output of the embedding module named
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
        self.model, self.quantity, self.column, self.module, self.name = (
            model,
            quantity,
            column,
            embedding,
            name,
        )
        self._place, self._note = module or "the model", note
        self.at_once, self.activations = False, 0.0
        self.sample: dict[str, Form] = {}
        self._axis = 0  # of the token ids: the examples

    def probe(self, batch: Batch, singles: Sequence[Batch]) -> None:
        """Settle whether batches are taken as such: where they agree with their examples taken
        alone.

        Raises GradientError: the module is not called, is not given token ids, or ids past its
        vocabulary.
        """
        size = len(singles)
        alone = [self._taken(single, 1) for single in singles]
        again = [self._taken(single, 1) for single in singles]
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
                batched, rows = self._taken(batch, size)
            except GradientError:
                raise
            except Exception as error:  # whatever a model does with a batch; one by one is right
                if is_out_of_memory(error):
                    raise
                continue
            self.at_once = close(batched, losses) and alike(rows, expected)
            if self.at_once:
                self.sample = {self.column: Postings.of(rows)}
                return
        self._axis = 0
        self._note(
            "gradients are taken one example at a time, right but slow: a batch does not give what "
            "its examples give alone"
        )

    def __call__(
        self, batch: Batch, singles: Callable[[int], Batch], size: int, values: bool = True
    ) -> Captured:
        """A batch of `size`; `singles(i)`: example i collated alone. `values` False: norms and
        losses only.
        """
        batched = self._batch(batch, size) if self.at_once else None
        if batched is None:
            parts = [self._taken(singles(i), 1) for i in range(size)]
            batched = torch.cat([loss for loss, _ in parts]), concat([part for _, part in parts])
        losses, rows = batched
        return Captured(
            losses.double(), {self.column: rows.sqnorm()}, {self.column: rows} if values else {}
        )

    def _batch(self, batch: Batch, size: int) -> tuple[Tensor, Any] | None:
        """All examples at once; None where this batch can't be taken so, which is said."""
        try:
            return self._taken(batch, size)
        except Exception as error:  # a batch unlike the first
            if isinstance(error, GradientError) or is_out_of_memory(error):
                raise
            self._note(
                "some batches are taken one example at a time, right but slow "
                f"({type(error).__name__}: {str(error)[:100]})"
            )
            return None

    def _taken(self, batch: Batch, size: int) -> tuple[Tensor, Any]:
        """Losses (size,), and the rows of each example, summed over the calls of the module."""
        calls: list[tuple[Tensor, Tensor]] = []

        def watch(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            ids = args[0] if args else None
            output = output.detach().requires_grad_()
            calls.append((self._ids(ids), output))
            return output

        with (
            frozen(self.model),
            torch.enable_grad(),
            watching(self.module, watch, lambda module, args: self._checked(args)),
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
        return losses.detach(), functools.reduce(merged, parts[1:], parts[0])

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

    def _checked(self, args: tuple[Any, ...]) -> None:
        ids, tokens = args[0] if args else None, self.module.num_embeddings
        if not isinstance(ids, Tensor) or ids.is_floating_point():
            difference = (
                f"{ids.dtype} of shape {tuple(ids.shape)}"
                if isinstance(ids, Tensor)
                else type(ids).__name__
            )
            raise GradientError(
                f"the embedding {self._place} is given {difference}",
                "expected: token ids, whole numbers",
                "look at the batch's ids: .long()",
            )
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < tokens:
            wrong = int(ids.max()) if int(ids.max()) >= tokens else int(ids.min())
            raise GradientError(
                f"the embedding {self._place} is given token {wrong}, which is past its vocabulary",
                f"expected: ids from 0 to {tokens - 1:,}",
                "another tokenizer than the model's, or a model built with another vocabulary",
            )

    @staticmethod
    def _ids(ids: Any) -> Tensor:
        assert isinstance(ids, Tensor)
        return ids.detach()[None] if ids.ndim == 0 else ids.detach()


@contextmanager
def watching(module: nn.Module, after: Any, before: Any) -> Iterator[None]:
    hooks = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mask_of(batch: Batch, ids: Tensor) -> Tensor | None:
    """The batch's attention mask where it is one of these ids."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None


def without_zeros(rows: EmbeddingRows) -> EmbeddingRows:
    """Without the rows that no position contributed to."""
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
    """The same gradients within rounding, relative to the largest."""
    largest = float(expected.sqnorm().max().sqrt())
    return bool(
        (
            distance(computed, expected)
            <= rounding(torch.float32 if largest == 0 else dtype_of(expected)) * largest
        ).all()
    )


def dtype_of(form: Form) -> torch.dtype:
    return next(value.dtype for value in form.tensors().values() if value.is_floating_point())
