"""Gradients of many batches, collected in one place."""

import pytest
import torch

from influence_cli.gradients.buffers import FormBuffer
from influence_cli.gradients.forms import Dense, Factors, Form


def layer(first: int, stop: int, positions: int = 1) -> dict[str, Form]:
    """A layer's gradients of examples first..stop. Its bias shares a tensor with its weight."""
    examples = torch.arange(first, stop, dtype=torch.float64).view(-1, 1, 1)
    left = examples + torch.arange(3.0) + torch.arange(positions).view(-1, 1)
    right = examples - torch.arange(4.0)
    right = right.expand(-1, positions, -1).contiguous()
    bias = left if positions == 1 else left.sum(1)
    return {"weight": Factors((3, 4), left, right), "bias": Dense((3,), bias.flatten(1))}


def test_batches_of_one_form_fill_a_buffer_that_a_layer_and_its_bias_share():
    buffer = FormBuffer(7)
    for first, stop in ((0, 3), (3, 6), (6, 7)):
        buffer.add(layer(first, stop))
    forms, expected = buffer.done(), layer(0, 7)
    for name, form in forms.items():
        assert form.kind == expected[name].kind
        for part, value in form.tensors().items():
            assert torch.equal(value, expected[name].tensors()[part])
    # so a unit of the cache has the tensor once
    assert (
        forms["weight"].tensors()["left"].data_ptr() == forms["bias"].tensors()["values"].data_ptr()
    )


@pytest.mark.parametrize("positions", [(1, 1, 2), (2, 1, 1), (1, 2, 1)])
def test_batches_of_other_lengths_keep_their_gradients(positions):
    buffer, batches = FormBuffer(6), []
    for at, length in enumerate(positions):
        batches.append(layer(2 * at, 2 * at + 2, length))
        buffer.add(batches[-1])
    for name, form in buffer.done().items():
        expected = torch.cat([batch[name].dense().values for batch in batches])
        assert torch.equal(form.dense().values, expected)
