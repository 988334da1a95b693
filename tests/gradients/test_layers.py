"""Every layer rule against batch-size-one autograd over random shapes, and which way each parameter
goes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from influence_cli.gradients.capture import Capture
from influence_cli.gradients.convolution_rules import (
    per_example_by_groups,
    per_example_by_patches,
)
from influence_cli.gradients.layer_rules import RULES
from tests import reference
from tests.cases import Case, numbers, squared
from tests.gradients.capturing import assert_equal, captured
from tests.gradients.layers import LAYERS, SLOW, UNKNOWN, Function, Pick, Separate, Within

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in ("Using padding='same'", ".*weight_norm")
]


def over_random_shapes(examples: int):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )
    return lambda test: chosen(given(data=st.data())(test))


@pytest.mark.parametrize("name", LAYERS)
@over_random_shapes(30)
def test_every_rule_equals_autograd_over_random_shapes(name, data):
    case = LAYERS[name](Pick(data.draw))
    result, expected, capture, notes = captured(case)
    assert set(capture.others) == set(case.falls) & set(expected), capture.why_not_hooked
    assert capture.at_once
    assert not notes
    assert_equal(result.forms, expected)


@pytest.mark.parametrize("name", LAYERS)
@over_random_shapes(3)
def test_rules_and_fallback_agree(name, data):
    result, expected, capture, _ = captured(LAYERS[name](Pick(data.draw)), hooked=())
    assert set(capture.others) == set(expected)
    assert_equal(result.forms, expected)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_use_without_a_rule_falls_back_alone(name):
    """What is not known goes to torch.func, which is said; the layers around it keep their
    rules.
    """
    make, shape = UNKNOWN[name]
    case = Case(
        lambda: nn.Sequential(nn.Linear(shape[-1], shape[-1]), make(), nn.Tanh()), numbers(*shape)
    )
    result, expected, capture, notes = captured(case)
    assert capture.hooked == ("0.weight", "0.bias")
    assert set(capture.why_not_hooked) == set(capture.others)
    assert capture.at_once
    assert not notes
    assert_equal(result.forms, expected)


@pytest.mark.parametrize("name", SLOW)
def test_what_torch_func_cannot_batch_is_taken_one_by_one(name):
    make, shape = SLOW[name]
    result, expected, capture, notes = captured(Case(make, numbers(*shape)))
    assert not capture.hooked
    assert not capture.at_once
    assert "one example at a time" in notes[0]
    assert_equal(result.forms, expected)


# ------------------------------------------------------------ batches unlike the one that was planned
def in_turn(model: nn.Module, batches: list[Any], loss=squared) -> tuple[Capture, list[Any]]:
    """Probe on the first batch's first two examples; the gradients of every batch are those of
    autograd.

    Also the parameters that torch.func took, batch by batch, and what was noted: empty where the
    rules took everything.
    """
    model, others = model.double().eval(), []
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    capture = Capture(model, loss, names, note=others.append)
    first = batches[0]
    capture.probe(first[:2], [first[i : i + 1] for i in range(2)])
    at_once = capture._by_torch_func
    capture._by_torch_func = lambda batch, names: (
        others.append(tuple(names)),
        at_once(batch, names),
    )[1]  # type: ignore[method-assign]
    for batch in batches:
        singles = [batch[i : i + 1] for i in range(len(batch))]
        result = capture(batch, lambda i, singles=singles: singles[i], len(batch))
        assert_equal(result.forms, reference.gradients(model, loss, singles))
    return capture, others


def lengths(*sizes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


class Alone(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.attention.batch_first:
            return self.attention(x, x, x, need_weights=False)[0]
        return self.attention(*[x.transpose(0, 1)] * 3, need_weights=False)[0].transpose(0, 1)


LENGTHS = {
    "linear": lambda: nn.Linear(4, 3),
    "attention": lambda: Alone(batch_first=True),
    "attention-batch-second": Alone,
    "encoder-layer": lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
    "gpt2": lambda: Function(
        lambda self, x: torch.addmm(self.b, x.view(-1, 4), self.w).view(*x.shape[:2], 3),
        w=(4, 3),
        b=(3,),
    ),
    "folded": lambda: Within(nn.Linear(4, 3), "folded"),
    "folded-inner": lambda: Within(nn.Linear(4, 3), "folded inner"),
    "folded-inner-norm": lambda: Within(
        nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), "folded inner"
    ),
    "folded-inner-scale": lambda: Within(
        Function(lambda self, x: x * self.w + self.b, w=(4,), b=()), "folded inner"
    ),
    "positions": lambda: Function(lambda self, x: torch.tanh(x + self.w[: x.shape[1]]), w=(9, 4)),
}


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("order", [(1, 5, 2), (5, 1, 3)], ids=str)
def test_batches_of_other_lengths_and_sizes_keep_their_rules(name, order):
    """A text of one token does not show how its positions will lie among the examples."""
    torch.manual_seed(0)
    sizes = [(count, length, 4) for count, length in zip((2, 3, 1), order, strict=True)]
    capture, others = in_turn(LENGTHS[name](), lengths(*sizes))
    assert not capture.others
    assert not others


def test_two_examples_that_are_the_same_do_not_mislead():
    torch.manual_seed(0)
    one, other = lengths((1, 3, 4), (3, 3, 4))
    for how in ("folded", "folded inner"):
        _, others = in_turn(Within(nn.Linear(4, 3), how), [one.expand(2, 3, 4), other])
        assert set(others) <= {("layer.weight", "layer.bias")}, "at worst by torch.func"


def test_positions_that_are_alike_at_first_do_not_mislead():
    """As where a layer begins at zero: nothing in the first batch tells examples from positions."""
    torch.manual_seed(0)
    batches = [torch.ones(2, 3, 4, dtype=torch.float64), *lengths((4, 3, 4))]
    weights = torch.tensor([1.0, -2.0, 0.5])[None, :, None]
    for how in ("folded", "folded inner"):
        _, others = in_turn(
            Within(nn.Linear(4, 3), how),
            batches,
            lambda model, x: (model(x) * weights).square().sum((1, 2)),
        )
        assert set(others) <= {("layer.weight", "layer.bias")}, "at worst by torch.func"


class Masking(nn.Module):
    """As in transformers: a mask is made only where the batch has something to hide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[..., :1] > 1
        h = torch.tanh(self.first(x))
        if bool(hidden.any()):
            h = h * (~hidden).to(h.dtype)
        return self.out(h)


def test_a_branch_on_a_batchs_content_is_planned_anew():
    torch.manual_seed(0)
    x = lengths((4, 3, 4))[0]
    capture, others = in_turn(Masking(), [x.clamp(max=0.9), x.abs() + 1, x.clamp(max=0.5)])
    assert len(capture.hooked) == 4
    assert not others


def test_a_use_without_a_rule_in_a_later_batch_is_noticed():
    torch.manual_seed(0)
    made = Function(
        lambda self, x: x @ self.w if x.shape[1] < 4 else torch.einsum("bsi,io->bso", x, self.w),
        w=(4, 3),
    )
    capture, others = in_turn(made, lengths((3, 3, 4), (2, 5, 4), (3, 3, 4)))
    assert capture.hooked == ("w",)
    assert others == [("w",)]


def test_other_layers_of_the_same_kind_in_a_later_batch_are_right():
    """Nothing of the plan's names a parameter: the calls are the same, their weights are not."""
    torch.manual_seed(0)
    made = Function(
        lambda self, x: F.linear(x, self.a if x.shape[1] < 4 else self.b), a=(3, 4), b=(3, 4)
    )
    capture, others = in_turn(made, lengths((3, 3, 4), (2, 5, 4)))
    assert len(capture.hooked) == 2
    assert not others


@pytest.mark.parametrize("kind", [nn.ReLU, nn.SiLU])
def test_a_layers_output_may_be_changed_in_place(kind):
    case = Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2),
            kind(inplace=True),
            nn.Flatten(),
            nn.Linear(9, 2),
            kind(inplace=True),
        ),
        numbers(2, 4),
    )
    result, expected, capture, _ = captured(case)
    assert not capture.others
    assert_equal(result.forms, expected)


def test_a_module_held_twice_survives_the_fallback():
    """torch.func puts each parameter in its place and back, once."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.PReLU(4)
            self.blocks = nn.ModuleList([layer, layer])

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](torch.sin(3 * self.blocks[0](x)))

    case = Case(Twice, numbers(4))
    result, expected, capture, _ = captured(case)
    assert capture.others == ("blocks.0.weight",)
    assert type(next(capture.model.parameters()).data) is Tensor
    assert_equal(result.forms, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_gradient_that_is_zero_but_for_rounding_keeps_its_rule(dtype):
    case = Case(
        lambda: nn.Sequential(Separate(24, 2), nn.LayerNorm(24), Separate(24, 2)), numbers(7, 24)
    )
    _, expected, capture, notes = captured(case, dtype)
    assert 0 < expected["0.k.bias"].abs().max() < 1e-12
    assert not capture.others, capture.why_not_hooked
    assert not notes


def test_a_wrong_rule_is_not_used(monkeypatch):
    from influence_cli.gradients import layer_rules
    from influence_cli.gradients.rule import Rule

    def wrong(call, x, g):
        return layer_rules.linear(call, x, g * 1.001)

    monkeypatch.setitem(layer_rules.RULES, F.linear, Rule(("input", "weight", "bias"), wrong))
    result, expected, capture, _ = captured(Case(lambda: nn.Linear(4, 3), numbers(4)))
    assert capture.others == ("weight", "bias")
    assert capture.why_not_hooked["weight"] == "its rule disagrees with autograd"
    assert_equal(result.forms, expected)


@pytest.mark.parametrize("convolve", [F.conv1d, F.conv_transpose1d])
def test_a_convolution_without_a_batch_axis_falls_back(convolve):
    """A kernel of one number over an axis that holds the examples: no rule, but right gradients."""
    made = Function(lambda self, x: convolve(x.T, self.w).T, w=(3, 3, 1))
    result, expected, capture, notes = captured(Case(lambda: made, numbers(3)))
    assert capture.others == ("w",)
    assert capture.at_once
    assert not notes
    assert_equal(result.forms, expected)


def test_the_page_on_layers_names_every_function_that_has_a_rule():
    page = (Path(__file__).parents[2] / "docs" / "adding-a-layer.md").read_text()
    listed = page.split("## Layers with a rule")[1]
    names = {function.__name__.strip("_") for function in RULES}
    assert not {name for name in names if f"`{name}`" not in listed}


# ------------------------------------------------------------ convolutions in both ways
@pytest.mark.parametrize("axes", [1, 2, 3])
@over_random_shapes(25)
def test_both_ways_of_a_convolution_equal_autograd(axes, data):
    """float64 to 1e-9; float32 to the rounding of its sums: eps per term of the sum of the terms'
    absolute values.
    """
    p = Pick(data.draw)
    groups, inside, out, rows = p(1, 3), p.of(1, 2, 8, 9), p(1, 3), p(1, 4)
    kernel, stride, padding, dilation = (
        tuple(p(low, high) for _ in range(axes)) for low, high in ((1, 3), (1, 3), (0, 2), (1, 2))
    )
    sizes = [max(2, d * (k - 1) + 1) + p(0, 3) for d, k in zip(dilation, kernel, strict=True)]
    convolve = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    generator = torch.Generator().manual_seed(p(0, 9))
    weight = torch.randn(groups * out, inside, *kernel, generator=generator)
    x = torch.randn(rows, groups * inside, *sizes, generator=generator)
    g = torch.randn(
        convolve(x, weight, None, stride, padding, dilation, groups).shape, generator=generator
    )

    def one_by_one(x: Tensor, g: Tensor) -> Tensor:
        w = weight.double().requires_grad_()
        outs = [
            convolve(row[None].double(), w, None, stride, padding, dilation, groups) for row in x
        ]
        return torch.stack(
            [
                torch.autograd.grad((out * row.double()).sum(), w)[0].flatten()
                for out, row in zip(outs, g, strict=True)
            ]
        )

    expected, terms = one_by_one(x, g), one_by_one(x.abs(), g.abs())
    for way in (per_example_by_groups, per_example_by_patches):
        exact = way(x.double(), g.double(), weight.double(), stride, padding, dilation, groups)
        assert (exact - expected).abs().max() <= 1e-9 * expected.abs().max()
        single = way(x, g, weight, stride, padding, dilation, groups)
        assert single.dtype == torch.float32
        assert (
            (single - expected).abs()
            <= torch.finfo(torch.float32).eps * g[0, 0].numel() * terms + 1e-30
        ).all()
