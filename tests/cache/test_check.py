"""influence check finds what it is there to find: each fault is built in, and the check that is for it names the layer."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from influence_cli.gradients import layer_rules
from influence_cli.gradients.forms import Dense
from influence_cli.run import parameters
from influence_cli.storage.safetensors_io import write_tensors
from tests.conftest import DEFINITION
from tests.refusals import replaced

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'


def failed(result) -> set[tuple[str, str]]:
    """(check, subject) of the rows that failed; the exit code and stderr must tell the same."""
    found = {(row["check"], row["subject"]) for row in result.rows if row["result"] == "FAILED"}
    assert {row["result"] for row in result.rows} <= {"ok", "FAILED"}
    assert result.code == bool(found), result.err
    first = next((row for row in result.rows if row["result"] == "FAILED"), None)
    assert (
        first is None
        or f"{first['check']} of {first['split']} examples: {first['subject']}" in result.err
    )
    return found


def test_a_sound_run_passes_and_every_parameter_is_looked_at(make_run, influence):
    run = make_run()
    influence("cache", run)
    result = influence("check", run)
    assert failed(result) == set()
    seen = {(row["check"], row["split"], row["subject"]) for row in result.rows}
    for split in ("train", "query"):
        for name in ("0.weight", "0.bias", "2.weight", "2.bias"):
            assert {
                (check, split, name) for check in ("gradients", "batches", "repeats", "coverage")
            } <= seen
    assert all(float(row["error"]) <= float(row["allowed"]) < 2e-3 for row in result.rows)
    assert sum(row["check"] == "cache" for row in result.rows) == 2 * 2 + 3


def test_a_check_leaves_no_cache_behind(make_run, influence):
    run = make_run()
    assert influence("check", run).code == 0
    assert not (run / ".influence").exists()


def test_a_wrong_rule_is_named_by_its_layer(make_run, influence, monkeypatch):
    """Wrong only for more examples than the probe takes, so that nothing else notices."""
    right = layer_rules.RULES[F.linear]

    def wrong(call, x, g):
        grads = right.gradients(call, x, g)
        if len(x) > 2 and call["weight"].shape == (3, 5):
            grads["bias"] = Dense(grads["bias"].shape, grads["bias"].dense().values * 1.01)
        return grads

    monkeypatch.setitem(layer_rules.RULES, F.linear, dataclasses.replace(right, gradients=wrong))
    found = failed(influence("check", make_run()))
    assert {("gradients", "2.bias"), ("coverage", "2.bias")} <= found
    assert not any(subject in ("0.weight", "0.bias", "2.weight") for _, subject in found)


def test_examples_that_influence_each_other_fail_in_other_batches(make_run, influence):
    """Only where there are more than two of them, so that the probe does not notice."""
    together = "out = model(batch[0])\n    return F.cross_entropy(out - (len(out) > 2) * out.mean(0), batch[1], reduction='none')"
    found = failed(influence("check", make_run(definition=replaced(DEFINITION, (LOSS, together)))))
    assert {("batches", "the loss"), ("batches", "2.weight"), ("gradients", "2.weight")} <= found, (
        found
    )


def test_a_loss_that_changes_from_call_to_call_is_found(make_run, influence):
    """The probe takes each example twice; this one begins to move later."""
    moving = (
        f"global calls\n    calls += 1\n    scale = 1 + max(0, calls - 40) / 50\n    {LOSS} * scale"
    )
    found = failed(
        influence(
            "check", make_run(definition=replaced("calls = 0\n" + DEFINITION, (LOSS, moving)))
        )
    )
    assert {("repeats", "the loss"), ("repeats", "0.weight")} <= found


def test_a_trained_parameter_without_gradients_is_found(make_run, influence, monkeypatch):
    everything = parameters.list_columns
    monkeypatch.setattr(
        parameters,
        "list_columns",
        lambda model: {name: c for name, c in everything(model).items() if name != "0.bias"},
    )
    result = influence("check", make_run())
    assert ("coverage", "0.bias") in failed(result)
    assert "influence computes no gradients of it" in result.err


def test_frozen_parameters_are_said(make_run, influence):
    model = "net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))\n    net[0].bias.requires_grad_(False)\n    return net"
    definition = replaced(
        DEFINITION, ("return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))", model)
    )
    result = influence("check", make_run(definition=definition))
    assert failed(result) == set()
    assert "1 frozen parameters have no gradients: 0.bias" in result.err


@pytest.mark.parametrize(
    ("factor", "fails"), [("1", set()), ("2", {("outputs", "loss_from_outputs()")})]
)
def test_outputs_must_give_the_loss(factor, fails, make_run, influence):
    more = f"""
def outputs(model, batch):
    return model(batch[0])

def loss_from_outputs(outputs, batch):
    return {factor} * F.cross_entropy(outputs, batch[1], reduction="none")
"""
    result = influence("check", make_run(definition=DEFINITION + more))
    assert any(row["check"] == "outputs" for row in result.rows)
    assert failed(result) == fails


def changed_gradient(path) -> None:
    tensors = load_file(path)
    tensors["0.weight:left"][3] *= 2
    from safetensors import safe_open

    with safe_open(path, "pt") as content:
        head = content.metadata()
    write_tensors(path, tensors, head)  # with checksums that fit


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (changed_gradient, "the gradients of 0.weight do not have their norms"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
    ],
    ids=["changed", "cut", "empty"],
)
def test_a_damaged_unit_is_found(damage, says, make_run, influence):
    run = make_run()
    influence("cache", run)
    path = next(
        path
        for path in sorted((run / ".influence").rglob("0*.safetensors"))
        if "train" in path.parts
    )
    damage(path)
    result = influence("check", run)
    assert any(check == "cache" for check, _ in failed(result))
    assert says in result.out
    assert path.name in result.out


def test_a_cache_of_other_data_is_found(make_run, influence):
    run = make_run()
    influence("cache", run)
    (run / "definition.py").write_text(
        replaced(DEFINITION, ("return examples(0, 20)", "return examples(5, 20)"))
    )
    result = influence("check", run)
    assert ("cache", "checkpoints/step-000010.safetensors, recomputed") in failed(result)
    assert "belongs to other data" in result.err


def test_float64_is_held_to_float64(make_run, influence):
    result = influence("check", make_run(), "--precision", "float64")
    assert failed(result) == set()
    assert max(float(row["error"]) for row in result.rows) < 1e-12
    assert torch.get_default_dtype() == torch.float32
