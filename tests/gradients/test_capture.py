"""Per-example gradients against batch-size-one autograd in float64, over the table of models."""

import pytest
import torch
from torch import nn

from influence_cli.errors import GradientError
from influence_cli.gradients.capture import Capture
from tests import reference
from tests.cases import CASES, Case, squared
from tests.gradients.capturing import captured


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_autograd_one_by_one(name):
    case = CASES[name]
    result, expected, capture, notes = captured(case)
    assert case.at_once is None or capture.at_once == case.at_once, notes
    assert capture.at_once or any("one example at a time" in note for note in notes), (
        "the slow way is announced"
    )
    for parameter, value in expected.items():
        rows = value.reshape(len(value), -1)
        assert (result.forms[parameter].dense().values - rows).norm() <= 1e-9 * max(
            1e-3, rows.norm()
        ), parameter
        torch.testing.assert_close(
            result.sqnorms[parameter], rows.square().sum(1), rtol=1e-9, atol=1e-15
        )


@pytest.mark.parametrize("name", CASES)
def test_gradients_in_float32_are_right_to_float32(name):
    result, expected, _, _ = captured(CASES[name], torch.float32)
    actual = torch.cat([form.dense().values.double() for form in result.forms.values()], dim=1)
    wanted = reference.flat(expected)
    # 1e-5 of the example's whole gradient: float32 keeps 1e-7, the models here lose at most two digits
    assert ((actual - wanted).norm(dim=1) <= 1e-5 * wanted.norm(dim=1)).all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.at_once])
def test_both_ways_agree(name):
    fast, _, _, _ = captured(CASES[name], at_once=True)
    slow, _, _, _ = captured(CASES[name], at_once=False)
    for parameter in fast.forms:
        torch.testing.assert_close(
            fast.forms[parameter].dense().values,
            slow.forms[parameter].dense().values,
            rtol=1e-9,
            atol=1e-12,
        )


def test_an_embedding_keeps_only_the_rows_of_its_tokens():
    result, _, _, _ = captured(CASES["embedding"])
    rows = result.forms["weight"]
    assert rows.kind == "rows" or rows.nbytes <= 5 * 9 * 4 * 8
    big = Case(lambda: nn.Embedding(1000, 4), CASES["embedding"].examples)
    assert captured(big)[0].forms["weight"].kind == "rows"


def test_a_batch_unlike_the_first_is_taken_one_by_one_and_said():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            if x.shape[1] > 4:
                return torch.stack([self.layer(row) * float(row.sum()) for row in x])
            return self.layer(x)

    model, notes = Short().double().eval(), []
    capture = Capture(model, squared, ["layer.weight", "layer.bias"], note=notes.append)
    first = torch.randn(2, 4, 3, dtype=torch.float64)
    capture.probe(first, [first[i : i + 1] for i in range(2)])
    assert capture.at_once
    later = torch.randn(3, 5, 3, dtype=torch.float64)
    result = capture(later, lambda i: later[i : i + 1], 3)
    expected = reference.gradients(model, squared, [later[i : i + 1] for i in range(3)])
    torch.testing.assert_close(
        result.forms["layer.weight"].dense().values,
        expected["layer.weight"].flatten(1),
        rtol=1e-9,
        atol=1e-12,
    )
    assert len(notes) == 1
    assert "one example at a time" in notes[0]


def test_examples_that_influence_each_other_are_named():
    notes = []
    model = nn.Linear(3, 2).double().eval()

    def contrast(model, batch):
        out = model(batch)
        return (out - out.mean(0)).square().sum(1) + out.sum(1)

    x = torch.randn(2, 3, dtype=torch.float64)
    Capture(model, contrast, ["weight"], note=notes.append).probe(x, [x[:1], x[1:]])
    assert any("influence each other" in note for note in notes)


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda model, batch: model(batch).sum(), "returned a scalar"),
        (lambda model, batch: model(batch), r"returned shape \(2, 2\) for a batch of 2"),
        (lambda model, batch: model(batch).sum(1).detach(), "not differentiable"),
        (lambda model, batch: model(batch).argmax(1), "returned torch.int64"),
        (lambda model, batch: [1.0, 2.0], "returned a list"),
    ],
)
def test_a_wrong_loss_is_refused(loss, says):
    x = torch.randn(2, 3)
    with pytest.raises(GradientError, match=says):
        Capture(nn.Linear(3, 2).eval(), loss, ["weight"]).probe(x, [x[:1], x[1:]])


def test_text_in_a_batch_stays_with_its_example():
    """The first two examples are of one source, so that only a rule, not the probe, can know that
    others differ.
    """
    x = torch.randn(6, 3, dtype=torch.float64)
    sources = ["a", "a", "a", "b", "b", "b"]

    def loss(model, batch):
        return model(batch[0]).sum(1) * torch.tensor(
            [1.0 if source == "a" else 0.1 for source in batch[1]], dtype=torch.float64
        )

    model, notes = nn.Linear(3, 2).double().eval(), []
    singles = [(x[i : i + 1], sources[i : i + 1]) for i in range(6)]
    capture = Capture(model, loss, ["weight"], note=notes.append)
    capture.probe((x[:2], sources[:2]), singles[:2])
    result = capture((x, sources), lambda i: singles[i], 6)
    expected = reference.gradients(model, loss, singles)["weight"]
    torch.testing.assert_close(
        result.forms["weight"].dense().values, expected.flatten(1), rtol=1e-12, atol=1e-12
    )
    assert "more than tensors" in notes[0]


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (
            lambda model, batch: torch.nn.functional.dropout(model(batch), 0.5).square().sum(1),
            "loss.. of example 0 is random",
        ),
        (lambda model, batch: model.train()(batch).sum(1), "switched the model to train mode"),
    ],
)
def test_a_loss_without_one_value_per_example_is_refused(loss, says):
    torch.manual_seed(0)
    x = torch.randn(2, 30)
    with pytest.raises(GradientError, match=says):
        Capture(nn.Linear(30, 20).eval(), loss, ["weight"]).probe(x, [x[:1], x[1:]])


def test_parameters_that_are_not_asked_for_keep_their_requires_grad():
    x = torch.randn(4, 3)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).eval()
    model[0].bias.requires_grad_(False)
    capture = Capture(model, squared, ["1.weight"])
    capture.probe(x[:2], [x[:1], x[1:2]])
    capture(x, lambda i: x[i : i + 1], 4)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_fused_attention_is_restored_afterwards():
    captured(CASES["encoder"])
    assert torch.backends.mha.get_fastpath_enabled()


def test_frozen_attention_computes_what_it_computes_in_training():
    """The fused path of attention writes zeros where a padded position has numbers in training."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Linear(8, 1)).double()
    model[0].requires_grad_(False)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    padded = torch.tensor([[False, False, False, True, True]])

    def loss(model, batch):
        return model[1](model[0](batch, src_key_padding_mask=padded)).square().sum((1, 2))

    expected = torch.autograd.grad(loss(model.train(), x).sum(), model[1].weight)[0]
    _, grads = Capture(model.eval(), loss, ["1.weight"]).single(x)
    torch.testing.assert_close(grads["1.weight"], expected, rtol=1e-12, atol=1e-12)


def test_a_model_that_makes_more_calls_for_more_examples_has_no_plan():
    def loss(model, batch):
        losses = batch.new_zeros(len(batch))
        for i in range(len(batch)):
            losses[i] = model(batch[i]).square().sum()
        return losses

    x, notes = torch.randn(2, 3, dtype=torch.float64), []
    capture = Capture(nn.Linear(3, 2).double().eval(), loss, ["weight"], note=notes.append)
    capture.probe(x, [x[:1], x[1:]])
    reason = "Unhooked: the model computes differently for other batch sizes"
    assert capture.why_not_hooked == {"weight": reason}


@pytest.mark.parametrize("other", [0, 1])
def test_the_examples_of_a_batch_all_have_its_structure_or_are_computed_alone(other):
    x, notes = torch.randn(2, 3, dtype=torch.float64), []
    singles = [(x[:1],), (x[1:],)]
    singles[other] += (torch.ones(1),)
    capture = Capture(
        nn.Linear(3, 2).double().eval(),
        lambda model, batch: squared(model, batch[0]),
        ["weight"],
        note=notes.append,
    )
    capture.probe((x,), singles)
    assert not capture.at_once
    assert "(a batch of one has another structure)" in notes[0]


def test_a_tensor_that_counts_the_examples_by_chance_is_shared_by_all_of_them():
    def loss(model, batch):
        # torch.func computes it: no layer rule knows a bilinear form
        return nn.functional.bilinear(batch[0], batch[0], model.weight)[:, 0] * batch[1].max()

    # the distinct words of a batch: two of both examples, one of the first alone
    x, words = torch.randn(2, 3, dtype=torch.float64), torch.tensor([9.0, 5.0])
    notes = []
    model = nn.Bilinear(3, 3, 1, bias=False).double().eval()
    capture = Capture(model, loss, ["weight"], note=notes.append)
    capture.probe((x, words), [(x[:1], words[:1]), (x[1:], words)])
    assert capture.at_once and capture.others == ("weight",), notes
