"""The rules of convolutions themselves, against autograd of one example. A wrong rule falls back to
torch.func, so that gradients of a model do not show it."""

import pytest
import torch
from torch.nn import functional as F

from influence_cli.gradients.convolution_rules import (
    convolution,
    per_example_by_groups,
    per_example_by_patches,
    transposed_convolution,
)

CALLS = {
    "plain": {},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": (2, 1)},
}


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("rule", [convolution, transposed_convolution])
def test_a_rule_gives_the_gradients_of_autograd(rule, name, groups):
    function = F.conv2d if rule is convolution else F.conv_transpose2d
    # (output, input / groups, ...), of a transposed one (input, output / groups, ...)
    shape = (6, 4 // groups, 3, 2) if rule is convolution else (4, 6 // groups, 3, 2)
    weight, bias = draw(*shape).requires_grad_(), draw(6).requires_grad_()
    x = draw(3, 2, 4, 7, 6)  # three examples of two rows
    call = {"weight": weight, "groups": groups, **CALLS[name]}
    if rule is transposed_convolution:
        call["output_padding"] = int(name == "strided")
    options = {key: value for key, value in call.items() if key != "weight"}
    outputs = [function(rows, weight, bias, **options) for rows in x]
    g = draw(3, *outputs[0].shape)
    form = rule({**call, "weight": weight.detach()}, x, g)
    for example, output in enumerate(outputs):
        by_weight, by_bias = torch.autograd.grad(output, (weight, bias), g[example])
        computed = form["weight"].dense().values[example].view_as(by_weight)
        assert torch.allclose(computed, by_weight, rtol=1e-10, atol=1e-10)
        assert torch.allclose(form["bias"].dense().values[example], by_bias, rtol=1e-10, atol=1e-10)
    total = torch.zeros(len(weight), weight[0].numel(), dtype=torch.float64)
    for at, left, right in form["weight"].positions():
        total[at] += left.T @ right
    assert torch.allclose(total.flatten(), form["weight"].dense().values.sum(0), rtol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_both_ways_of_a_weight_gradient_agree(axes, groups):
    weight = torch.zeros(6, 8 // groups, *[3] * axes)
    x, g = (
        draw(5, 8, *[6] * axes, dtype=torch.float32),
        draw(5, 6, *[6] * axes, dtype=torch.float32),
    )
    places = (1,) * axes
    one, two = (
        way(x, g, weight, places, places, places, groups)
        for way in (per_example_by_groups, per_example_by_patches)
    )
    assert one.shape == two.shape == (5, weight.numel())
    assert torch.allclose(one, two, rtol=1e-4, atol=1e-3)
