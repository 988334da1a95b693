"""Collect the gradients of many examples, batch after batch, without a second copy."""

from collections.abc import Mapping

import torch
from torch import Tensor

from influence_cli.gradients.form_ops import concat, from_tensors
from influence_cli.gradients.forms import Form
from influence_cli.gradients.sparse_forms import EmbeddingRows


class FormBuffer:
    """The gradients of `count` examples, on the CPU.

    Where all batches have the same form, it copies them into one buffer. From a GPU it copies into
    pinned memory, without waiting for the GPU. Parameters that share a tensor in each batch share a
    buffer: a layer's left factors are the gradients of its bias.
    """

    def __init__(self, count: int) -> None:
        self._count, self._filled = count, 0
        self._buffers: dict[str, Form] = {}
        self._others: dict[str, list[Form]] = {}

    def add(self, forms: Mapping[str, Form]) -> None:
        """Add the next batch: a form per parameter."""
        size = len(next(iter(forms.values())))
        at = slice(self._filled, self._filled + size)
        # tensors of this batch -> the buffers that hold them
        copied: dict[tuple[int, int], tuple[int, int]] = {}
        for name, form in forms.items():
            if not self._filled and not isinstance(form, EmbeddingRows):
                self._buffers[name] = self._begin(form, copied)
            if name in self._buffers and not fits(form, self._buffers[name]):
                self._others[name] = [self._buffers.pop(name).take(torch.arange(self._filled))]
            if name not in self._buffers:
                self._others.setdefault(name, []).append(form.to(torch.device("cpu")))
                continue
            for part, value in form.tensors().items():
                buffer = self._buffers[name].tensors()[part]
                if copied.get(identity(value)) != identity(buffer):
                    buffer[at].copy_(value, non_blocking=True)
                    copied[identity(value)] = identity(buffer)
        self._filled += size

    def _begin(self, form: Form, shared: dict[tuple[int, int], tuple[int, int]]) -> Form:
        """An empty buffer like `form`. It uses the buffer of another parameter that has the same
        tensor.
        """
        tensors = {}
        known = {
            identity(value): value
            for other in self._buffers.values()
            for value in other.tensors().values()
        }
        for part, value in form.tensors().items():
            shape = (self._count, *value.shape[1:])
            same = known.get(shared.get(identity(value), (0, 0)))
            shared_one = same if value.numel() else None
            tensors[part] = (
                torch.empty(shape, dtype=value.dtype, pin_memory=value.is_cuda)
                if shared_one is None
                else shared_one.view(shape)
            )
        return from_tensors(form.kind, form.shape, tensors)

    def done(self) -> dict[str, Form]:
        """All gradients that were added."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the GPU copies while Python continues
        return self._buffers | {name: concat(parts) for name, parts in self._others.items()}


def identity(value: Tensor) -> tuple[int, int]:
    return value.data_ptr(), value.numel()


def fits(form: Form, buffer: Form) -> bool:
    buffers = buffer.tensors()
    return form.kind == buffer.kind and all(
        value.shape[1:] == buffers[part].shape[1:] for part, value in form.tensors().items()
    )
