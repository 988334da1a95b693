"""in-run: brute-force Shapley values of a step, and sums that equal the fall of the query's loss."""

import itertools
import json
import math
import re

import pytest
import torch

from influence_cli.errors import UsageProblem
from influence_cli.methods.in_run import InRunOptions
from tests.refusals import refused, replaced
from tests.training import DEFINITION, definition_of, train

QUADRATIC = replaced(
    DEFINITION,
    (
        "nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()",
        "nn.Linear(4, 3).double()",
    ),
    (
        'F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
        "(model(batch[0]) - F.one_hot(batch[1], 3)).square().sum(1)",
    ),
)


def scores(influence, run, *flags):
    done = influence(
        "score", run, "--method", "in-run", "--top", "all", "--format", "jsonl", "--cache", "none", *flags
    )  # fmt: skip
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in done.out.splitlines()]
    return {(row["query"], row["train"]): row["score"] for row in rows if "query" in row}, done.err


def gap(err):
    """The note's difference between the sum of the scores and the fall, relative."""
    return float(re.search(r"mean difference is ([\d.]+)% of the mean fall", err)[1]) / 100


def shapley_values(run, query):
    """Of each example of step 0, by all subsets of its batch: the fall of the query's loss."""
    space = definition_of(run)
    from safetensors.torch import load_model

    model = space["model"]()
    load_model(model, run / "checkpoints/step-000000.safetensors")
    line = json.loads((run / "trajectory.jsonl").read_text().splitlines()[1])
    data, queries = space["train_data"](), space["query_data"]()
    batch_of = lambda rows: [torch.stack([row[k] for row in rows]) for k in (0, 1)]  # noqa: E731
    parameters = list(model.parameters())
    start = [p.detach().clone() for p in parameters]
    examples, weight = line["examples"], 1 / len(line["examples"])
    grads = [
        torch.autograd.grad(space["loss"](model, batch_of([data[z]])).sum(), parameters)
        for z in examples
    ]

    def loss_after(members):
        with torch.no_grad():
            for k, parameter in enumerate(parameters):
                parameter.copy_(
                    start[k]
                    - line["lr"]
                    * weight
                    * sum((grads[m][k] for m in members), torch.zeros_like(start[k]))
                )
            return float(space["loss"](model, batch_of([queries[query]])))

    losses = {
        s: loss_after(s)
        for n in range(len(examples) + 1)
        for s in itertools.combinations(range(len(examples)), n)
    }
    values = {}
    for m, example in enumerate(examples):
        value = 0.0
        for members in losses:
            if m in members:
                continue
            share = math.factorial(len(members)) * math.factorial(len(examples) - len(members) - 1)
            value += share * (losses[members] - losses[tuple(sorted((*members, m)))])
        values[example] = value / math.factorial(len(examples))
    return values


def test_order_2_is_the_shapley_value_of_a_quadratic_loss(tmp_path, influence):
    run = train(tmp_path / "run", steps=1, batch=5, rate=0.1, definition=QUADRATIC)
    values = shapley_values(run, 0)
    second, _ = scores(influence, run)
    first, _ = scores(influence, run, "--order", "1")
    largest = max(map(abs, values.values()))
    assert max(abs(second[0, z] - value) for z, value in values.items()) < 1e-12 * largest
    assert max(abs(first[0, z] - value) for z, value in values.items()) > 1e-2 * largest


@pytest.mark.parametrize(("order", "ratio"), [("1", 4), ("2", 8)])
def test_the_error_falls_with_the_order_of_the_step(order, ratio, tmp_path, influence):
    """Over all 64 subsets of a batch of six. Halving the rate divides the error by 2^(order + 1)."""
    errors = []
    for rate in (0.2, 0.1):
        run = train(tmp_path / str(rate), steps=1, batch=6, rate=rate)
        values = shapley_values(run, 1)
        own, _ = scores(influence, run, "--order", order)
        errors.append(max(abs(own[1, z] - value) for z, value in values.items()))
    assert errors[0] / errors[1] == pytest.approx(ratio, rel=0.15)


TRAININGS = {
    "sgd": {},
    "momentum": {"options": {"momentum": 0.9}, "rate": 0.1},
    "nesterov and weight decay": {
        "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        "rate": 0.05,
    },
    "clipped": {"clip": lambda norm: min(1.0, 0.3 / norm)},
    "weights": {"weights": True},
    "adam": {"kind": torch.optim.Adam, "rate": 0.02, "options": {"weight_decay": 0.1}},
    "adamw": {"kind": torch.optim.AdamW, "rate": 0.02, "options": {"weight_decay": 0.1}},
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_on_the_way_scores_and_weight_decay_sum_to_the_fall(training, tmp_path, influence):
    run = train(tmp_path / "run", every=4, **training)
    own, err = scores(influence, run, "--order", "path:8")
    space = definition_of(run)
    assert gap(err) < 1e-4
    assert ("weight decay" in err) == ("weight_decay" in training.get("options", {}))
    assert len(own) == len(space["query_data"]()) * len(space["train_data"]())


def test_order_2_is_closer_to_the_fall_than_order_1(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    gaps = [gap(scores(influence, run, "--order", order)[1]) for order in ("1", "2", "path:4")]
    assert gaps[0] > 5 * gaps[1] > 25 * gaps[2]


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_momentum_from_before_the_first_checkpoint_has_its_share(name, tmp_path, influence):
    run = train(tmp_path / "run", every=4, states=True, **TRAININGS[name])
    _, err = scores(influence, run, "--order", "path:8", "--steps", "4:")
    assert "momentum from before" in err
    assert gap(err) < 1e-4


def test_order_1_is_the_formula(tmp_path, influence):
    """Every step saved: rate x weight x g(query) . g(example), by autograd."""
    run = train(tmp_path / "run", steps=3)
    space = definition_of(run)
    from safetensors.torch import load_model

    lines = [json.loads(line) for line in (run / "trajectory.jsonl").read_text().splitlines()[1:]]
    model, data, queries = space["model"](), space["train_data"](), space["query_data"]()
    expected = {}

    def grad(row):
        batch = [row[0][None], row[1][None]]
        grads = torch.autograd.grad(space["loss"](model, batch).sum(), list(model.parameters()))
        return torch.cat([g.flatten() for g in grads])

    for step, line in enumerate(lines):
        load_model(model, run / f"checkpoints/step-{step:06d}.safetensors")
        for z in line["examples"]:
            product = float(grad(queries[2]) @ grad(data[z])) * line["lr"] / len(line["examples"])
            expected[z] = expected.get(z, 0.0) + product
    own, _ = scores(influence, run, "--order", "1")
    assert {z: own[2, z] for z in expected} == pytest.approx(expected, rel=1e-10)


def test_parts_sum_to_the_scores_and_a_mean_query_is_the_mean(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    own, _ = scores(influence, run)
    for by in ("step", "layer"):
        done = influence(
            "score", run, "--method", "in-run", "--top", "all", "--by", by, "--cache", "none"
        )
        sums = {}
        for row in done.rows:
            key = int(row["query"]), int(row["train"])
            sums[key] = sums.get(key, 0.0) + float(row["score"])
        assert sums == pytest.approx({key: own[key] for key in sums}, rel=1e-9, abs=1e-12)
    mean, _ = scores(influence, run, "--sum-queries")
    queries = {query for query, _ in own}
    for (_, z), value in mean.items():
        assert value == pytest.approx(sum(own[q, z] for q in queries) / len(queries), abs=1e-12)


def test_trace_has_the_scores_of_the_steps(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    done = influence("trace", run, "--method", "in-run", "--queries", 0, "--cache", "none")
    assert done.code == 0, done.err
    assert len(done.rows) >= 12


@pytest.mark.parametrize("order", ["3", "path:0", "path:65", "path:", "two"])
def test_an_unknown_order_is_refused(order):
    with pytest.raises(UsageProblem, match=f"--order {order}: unknown"):
        InRunOptions(order=order)


def test_without_a_trajectory_it_says_what_it_needs(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    (run / "trajectory.jsonl").unlink()
    refused(influence("score", run, "--method", "in-run"), 1, "in-run needs the order of training")
