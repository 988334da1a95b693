"""Scores that are computed while gradients are captured (--cache none): the formula, cached scores,
and numbers at the ends of float32.
"""

import pytest
import torch
from torch import nn

from influence_cli.gradients import forms
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.layer_rules import live_positions
from influence_cli.methods import fused_products
from influence_cli.methods.products import ScaledQueries, products_in_range
from tests import reference
from tests.cases import CASES
from tests.conftest import DEFINITION
from tests.methods.test_tracin import OF_CASE, expected, table

FLAGS = (
    "--by layer",
    "--by checkpoint",
    "--normalize",
    "--normalize --by layer",
    "--sum-queries",
    "--group-by label",
    "--project 8",
    "--project 8 --normalize",
    "--layers 2",
    "--train 3,7,11:13",
    "--method grad-dot",
    "--method grad-cos",
    "--batch-size 3",
    "--precision bfloat16",
)


def run_of(name, make_run):
    return make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)


@pytest.mark.parametrize(("precision", "limit"), [("float64", 1e-9), ("float32", 1e-5)])
@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_formula(name, precision, limit, make_run, influence):
    run = run_of(name, make_run)
    result = influence(
        "score", run, "--top", "all", "--cache", "none", "--precision", precision, "--batch-size", 4
    )
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < limit


@pytest.mark.parametrize("flags", FLAGS)
def test_scores_equal_those_of_a_cache(flags, make_run, influence):
    run = make_run()
    limit = 1e-2 if "bfloat16" in flags else 1e-6
    with_cache, live, again = (
        influence("score", run, "--top", "all", *flags.split(), *more)
        for more in ((), ("--cache", "none"), ("--cache", "none"))
    )
    assert live.code == 0, live.err
    assert live.out == again.out
    assert live.err == again.err

    def cells(result):
        keys = ("query", "train", "group", "layer", "checkpoint", "part", "value")
        named = (tuple(row.get(key, "") for key in keys) for row in result.rows)
        return dict(zip(named, (float(row["score"]) for row in result.rows), strict=True))

    first, second = cells(with_cache), cells(live)
    assert first.keys() == second.keys()
    largest = max(map(abs, first.values()))
    assert max(abs(first[key] - second[key]) for key in first) < limit * largest


@pytest.mark.parametrize("name", ["mlp", "tied", "encoder"])
@pytest.mark.parametrize("way", ["one example at a time", "slices of one row", "slices"])
def test_every_way_of_the_products_is_right(way, name, make_run, influence, monkeypatch):
    monkeypatch.setattr(forms, "PART_BYTES", 1)
    if way != "one example at a time":
        monkeypatch.setattr(forms, "SLICED_BYTES", 1)
        monkeypatch.setattr(forms, "LEAST_ROWS", 1)
        monkeypatch.setattr(forms, "MOST_ROWS", 1 if way == "slices of one row" else 3)
    run = run_of(name, make_run)
    result = influence("score", run, "--top", "all", "--cache", "none", "--precision", "float64")
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < 1e-9


@pytest.mark.parametrize("factor", ["1e-30", "1e-18", "1e18", "1e25"])
def test_scores_of_scaled_losses_are_scaled(factor, make_run, influence):
    """Gradients that float32 holds, whose products it does not hold."""
    usual = influence("score", make_run("usual"), "--top", "all", "--cache", "none")
    text = DEFINITION.replace('reduction="none")', f'reduction="none") * {factor}')
    scaled = influence("score", make_run("scaled", text), "--top", "all", "--cache", "none")
    error = reference.relative_error(table(scaled, 6, 20) / float(factor) ** 2, table(usual, 6, 20))
    assert error < 1e-5


def test_one_example_of_tiny_gradients_keeps_its_digits(make_run, influence):
    text = DEFINITION.replace(
        'reduction="none")',
        'reduction="none") * torch.where(batch[0][:, 0] == train_data()[4][0][0], 1e-36, 1.0)',
    )
    run = make_run(definition=text)
    live, exact = (
        table(influence("score", run, "--top", "all", "--cache", "none", *flags), 6, 20)
        for flags in ((), ("--precision", "float64"))
    )
    assert 0 < exact[:, 4].abs().max() < 1e-30
    assert reference.relative_error(live[:, 4], exact[:, 4]) < 1e-4


def refuses_example_4(make_run, influence):
    """The gradient of one training example is not finite, and its loss is."""
    text = DEFINITION.replace(
        'reduction="none")',
        'reduction="none") + (model(batch[0]).square().sum(1)'
        " * (batch[0][:, 0] - train_data()[4][0][0]).abs()).sqrt()",
    )
    result = influence("score", make_run(definition=text), "--cache", "none")
    assert result.code == 1
    assert "is not finite at" in result.err
    assert "example 4 of train_data()" in result.err


def test_a_gradient_that_is_not_finite_is_named(make_run, influence):
    refuses_example_4(make_run, influence)


def test_a_row_of_an_embedding_that_is_not_finite_is_named(make_run, influence):
    """No query has its token, so no product reads it."""
    text = """
import torch
from torch import nn

class Infinite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, tokens):
        ctx.save_for_backward(tokens)
        return value.clone()
    @staticmethod
    def backward(ctx, gradient):
        (tokens,) = ctx.saved_tensors
        return gradient.masked_fill((tokens == 8)[..., None], float("inf")), None

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)
    def forward(self, x):
        return self.out(Infinite.apply(self.emb(x), x).mean(1))

def model(): return Model()
def train_data(): return [torch.tensor([i % 8, i + 1 if i == 7 else 0]) for i in range(8)]
def query_data(): return [torch.tensor([1, 2]), torch.tensor([3, 0])]
def loss(model, batch): return model(batch).square().sum(1)
"""
    result = influence("score", make_run(definition=text), "--cache", "none")
    assert result.code == 1
    assert "the gradient of emb.weight is not finite" in result.err
    assert "example 7 of train_data()" in result.err


def test_gradients_of_zero_score_zero(make_run, influence):
    text = DEFINITION.replace(
        'reduction="none")', 'reduction="none") * (batch[1] != train_data()[0][1])'
    )
    run = make_run(definition=text)
    live, with_cache = (
        table(influence("score", run, "--top", "all", *flags), 6, 20)
        for flags in (("--cache", "none"), ())
    )
    assert (live[:, 0] == 0).all()
    assert reference.relative_error(live, with_cache) < 1e-6


@pytest.mark.parametrize(("measured", "probes"), [(False, 1), (True, 2)])
def test_splits_that_share_a_loss_are_probed_once(
    measured, probes, make_run, influence, monkeypatch
):
    calls, probe = [], Capture.probe
    monkeypatch.setattr(
        Capture, "probe", lambda self, *args: (calls.append(1), probe(self, *args))[1]
    )
    text = DEFINITION + "\ndef measure(model, batch):\n    return -loss(model, batch)\n"
    run = make_run(definition=text if measured else DEFINITION)
    assert influence("score", run, "--cache", "none").code == 0
    assert len(calls) == probes


def test_dead_positions_are_dropped():
    g, x = torch.zeros(3, 4, 2), torch.randn(3, 4, 5)
    g[1, 2] = 1.0
    g[0, 0] = torch.nan
    live, inputs = live_positions(g, x)
    assert torch.equal(live[:, 1], g[:, 2])
    assert torch.equal(inputs, x[:, [0, 2]])
    live, inputs = live_positions(torch.zeros(3, 4, 2), x)
    assert live.shape[1] == inputs.shape[1] == 1


def test_a_classifier_of_one_position_keeps_one_position():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3)).eval()
    x = torch.randn(6, 4, 5)
    names = [name for name, _ in layers.named_parameters()]
    capture = Capture(layers, lambda model, batch: model(batch)[:, 1].square().sum(1), names)
    capture.probe(x[:2], [x[:1], x[1:2]])
    _, shapes = capture.visit(x, lambda i: x[i : i + 1], 6, lambda name, form: form.tensors())
    assert shapes["0.weight"]["left"].shape == (6, 1, 7)


@pytest.fixture
def unwatched(monkeypatch):
    """As on a CUDA device: a block is looked at when it is computed. Counts the computed blocks."""
    blocks = []
    original = fused_products.FusedProducts._visit

    def counting(self, columns, ids, advance, where, looks):
        blocks.append(looks)
        return original(self, columns, ids, advance, where, looks)

    monkeypatch.setattr(fused_products, "looks_at_batches", lambda source: False)
    monkeypatch.setattr(fused_products.FusedProducts, "_visit", counting)
    return blocks


@pytest.mark.parametrize("name", CASES)
def test_a_block_that_is_looked_at_once_has_the_same_scores(name, make_run, influence, unwatched):
    run = run_of(name, make_run)
    flags = "--top", "all", "--cache", "none", "--precision", "float32"
    result = influence("score", run, *flags)
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < 1e-5
    assert unwatched
    assert not any(unwatched)


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_of_a_block_that_is_looked_at_once(
    flags, make_run, influence, unwatched, monkeypatch
):
    run = make_run()
    command = "score", run, "--top", "all", "--cache", "none", *flags.split()
    once = influence(*command)
    assert not any(unwatched)
    monkeypatch.setattr(fused_products, "looks_at_batches", lambda source: True)
    assert influence(*command).out == once.out


@pytest.mark.parametrize("factor", ["1e-30", "1e25"])
def test_numbers_that_leave_the_range_are_computed_again(
    factor, make_run, influence, unwatched, monkeypatch
):
    text = DEFINITION.replace('reduction="none")', f'reduction="none") * {factor}')
    run = make_run(definition=text)
    once = influence("score", run, "--top", "all", "--cache", "none")
    assert unwatched == [False, True] * 2  # checkpoints
    monkeypatch.setattr(fused_products, "looks_at_batches", lambda source: True)
    assert influence("score", run, "--top", "all", "--cache", "none").out == once.out


def test_a_gradient_that_is_not_finite_is_named_after_the_block(make_run, influence, unwatched):
    refuses_example_4(make_run, influence)


@pytest.mark.parametrize("name", CASES)
def test_the_magnitude_of_a_form_bounds_its_numbers(name, make_run, influence, monkeypatch):
    """All forms that capture makes: between the largest number and 10^6 times it, or 0."""
    seen = []

    def look(form, queries, device, memo=None):
        dense, sizes = form.dense().values.abs().double(), form.magnitude()
        largest = dense.flatten(1).amax(1)
        assert (sizes >= largest * 0.999 / (1 + dense[0].numel())).all()
        assert (largest[sizes == 0] == 0).all()
        assert (sizes <= 1e6 * largest.clamp_min(1e-8)).all()
        seen.append(form.kind)
        return original(form, queries, device, memo)

    original = fused_products.products_in_range
    monkeypatch.setattr(fused_products, "products_in_range", look)
    run = run_of(name, make_run)
    assert influence("score", run, "--cache", "none", "--precision", "float64").code == 0
    assert seen


def test_products_past_float32_are_exact_where_queries_are_scaled():
    """Of training gradients near the end of float32, and queries that a power of two divides."""
    train, query = (forms.Dense((100,), torch.full((2, 100), value)) for value in (3e37, 1e20))
    queries = ScaledQueries.of(query)
    assert queries.scale_Q is not None
    scores, _ = products_in_range(train, queries, torch.device("cpu"))
    assert torch.allclose(scores, torch.full((2, 2), 3e59, dtype=torch.float64))
