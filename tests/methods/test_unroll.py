"""Unroll through the real command against retraining by torch's own optimizers, in float64."""

import json
import os
import shutil
import signal
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load as load_file_of
from safetensors.torch import save_file

from influence_cli.methods.reverse import replayed_steps, resume
from influence_cli.methods.reverse.unroll_cost import UnrollCost
from tests.forked import run_fork
from tests.refusals import refused
from tests.training import DEFINITION, definition_of, load, train

GROUPS = (
    {"params": ["0.weight", "0.bias"], "lr": 0.5},
    {"params": ["2.weight", "2.bias"], "weight_decay": 0.3},
)
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
TRAININGS = {
    "sgd": {},
    "sum": {"reduction": "sum", "rate": 0.05},
    "weights of each entry": {"weights": True},
    "momentum, weight decay": {"options": {"momentum": 0.9, "weight_decay": 0.05}, "rate": 0.1},
    "nesterov": {"options": {"momentum": 0.8, "weight_decay": 0.05, "nesterov": True}, "rate": 0.1},
    "clipped": {"clip": lambda norm: min(1.0, 0.3 / norm)},
    "clipped nesterov": {
        "clip": lambda norm: min(1.0, 0.5 / norm),
        "options": {"momentum": 0.9, "nesterov": True},
        "rate": 0.1,
    },
    "groups of two rates": {"groups": GROUPS},
    "batches of other lengths, an example twice": {
        "batches": lambda t: [t % 24, 3, 3, *range(t % 3)]
    },
    "adam": {"kind": ADAM, "rate": 0.05},
    "adam, weight decay": {
        "kind": ADAM,
        "rate": 0.05,
        "options": {"weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-3},
    },
    "adamw": {"kind": ADAMW, "rate": 0.05},
    "adamw of groups, clipped": {
        "kind": ADAMW,
        "rate": 0.05,
        "groups": GROUPS,
        "clip": lambda norm: min(1.0, 0.3 / norm),
    },
    "adam clipped, weights": {
        "kind": ADAM,
        "rate": 0.02,
        "clip": lambda norm: min(1.0, 0.3 / norm),
        "weights": True,
    },
}
OUTPUTS = (
    DEFINITION
    + """
def outputs(model, batch):
    return model(batch[0])

def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")
"""
)


def unroll(influence, run, *flags):
    return influence("score", run, "--method", "unroll", "--top", "all", *flags)


def of_steps(result):
    """(step, example) -> (Q,) scores, of a table --by step."""
    assert result.code == 0, result.err
    scores = defaultdict(lambda: torch.zeros(5, dtype=torch.float64))
    for row in result.rows:
        scores[int(row["step"]), int(row["train"])][int(row["query"])] += float(row["score"])
    return dict(scores)


def at_the_end(folder, step=12):
    """(Q,) the queries' losses."""
    space = definition_of(folder)
    model, queries = space["model"](), space["query_data"]()
    load(model, folder, step)
    return space["loss"](model, queries.tensors).detach()


def slopes(folder, training, step, example, by=1e-5):
    """(Q,) -w x the derivative of the queries' losses at the end by w, from two trainings.

    w is the example's weight in a step.
    """
    ends = [
        at_the_end(train(folder / f"{sign}", **training, every=12, tilt=(step, example, sign * by)))
        for sign in (-1, 1)
    ]
    line = json.loads((folder / "run" / "trajectory.jsonl").read_text().splitlines()[1 + step])
    weight = 1 / len(line["examples"]) if training.get("reduction", "mean") == "mean" else 1.0
    weight = line["weights"][line["examples"].index(example)] if "weights" in line else weight
    for sign in (-1, 1):
        shutil.rmtree(folder / f"{sign}")
    return -weight * (ends[1] - ends[0]) / (2 * by)


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_scores_are_the_derivatives_of_really_training_again(training, tmp_path, influence):
    run = train(tmp_path / "run", **training)
    actual = of_steps(unroll(influence, run, "--by", "step", "--replay"))
    lines = [json.loads(text) for text in (run / "trajectory.jsonl").read_text().splitlines()[1:]]
    for step in (0, 5, 11):
        example = lines[step]["examples"][-1]
        wanted = slopes(tmp_path, training, step, example)
        assert (actual[step, example] - wanted).abs().max() < 2e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    "name", ["sgd", "momentum, weight decay", "clipped nesterov", "groups of two rates"]
)
def test_where_every_step_is_saved_a_replay_changes_nothing(name, tmp_path, influence):
    run = train(tmp_path / "run", **TRAININGS[name])
    plain, again = (
        of_steps(unroll(influence, run, "--by", "step", *flags)) for flags in ((), ("--replay",))
    )
    largest = max(float(values.abs().max()) for values in plain.values())
    assert max(float((plain[key] - again[key]).abs().max()) for key in plain) < 1e-12 * largest


def test_a_training_batch_larger_than_the_batch_size_is_computed_in_parts(tmp_path, influence):
    run = train(tmp_path / "run", batches=lambda t: [t % 24, *range(t % 5)])
    complete, parts = (
        of_steps(unroll(influence, run, "--by", "step", *flags))
        for flags in ((), ("--batch-size", "2"))
    )
    largest = max(float(values.abs().max()) for values in complete.values())
    assert (
        max(float((complete[key] - parts[key]).abs().max()) for key in complete) < 1e-12 * largest
    )


def test_the_cost_counts_each_pass_over_the_steps():
    # each of 3 passes: 100 steps back that take 4 steps' time each, and the steps again
    cost = UnrollCost(100, 3, step_seconds=0.01, back_seconds=0.04, replay=True, memory=3 << 20)
    assert cost.trainings == 15 and cost.seconds == 15
    without = UnrollCost(100, 3, step_seconds=0.01, back_seconds=0.04, replay=False, memory=0)
    assert without.trainings == 12


@pytest.mark.parametrize("method", ["unroll", "dve"])
@pytest.mark.parametrize("name", ["sgd", "momentum, weight decay", "adamw"])
def test_a_replay_from_few_checkpoints_is_that_from_all(
    name, method, tmp_path, influence, monkeypatch
):
    """Also where few states fit into memory, so that steps are run again and again."""
    sparse, dense = (train(tmp_path / f"{n}", **TRAININGS[name], every=n) for n in (5, 1))
    flags = ("--method", method, "--by", "step", "--replay", "--top", "all")
    wanted = of_steps(influence("score", dense, *flags))
    for room in (1 << 30, 0):
        monkeypatch.setattr(replayed_steps, "STATE_BYTES", room)
        result = influence("score", sparse, *flags, "--cache", "none")
        actual = of_steps(result)
        assert "replay: it reproduced 3 saved checkpoints" in result.err
        largest = max(float(values.abs().max()) for values in wanted.values())
        assert (
            max(float((wanted[key] - actual[key]).abs().max()) for key in wanted) < 1e-10 * largest
        )


def test_a_saved_optimizer_state_is_where_a_replay_begins(tmp_path, influence):
    run = train(tmp_path / "run", kind=ADAM, rate=0.05, every=4, states=True)
    all_scores = of_steps(unroll(influence, run, "--by", "step", "--replay"))
    later = of_steps(unroll(influence, run, "--by", "step", "--replay", "--steps", "4:"))
    assert {step for step, _ in later} == set(range(4, 12))
    largest = max(float(values.abs().max()) for values in all_scores.values())
    assert max(float((all_scores[key] - later[key]).abs().max()) for key in later) < 1e-10 * largest
    for path in (run / "optimizer").iterdir():
        path.unlink()
    refused(
        unroll(influence, run, "--replay", "--steps", "4:"),
        1,
        "adam had a state there",
        "save_optimizer=True",
    )


def test_parts_sum_to_the_score(tmp_path, influence):
    run = train(tmp_path / "run", every=5, options={"momentum": 0.5})
    all_scores = {
        (row["query"], row["train"]): float(row["score"]) for row in unroll(influence, run).rows
    }
    for part in ("step", "checkpoint", "layer"):
        result = unroll(influence, run, "--by", part)
        sums = defaultdict(float)
        for row in result.rows:
            sums[row["query"], row["train"]] += float(row["score"])
        assert max(abs(sums[key] - all_scores[key]) for key in all_scores) < 1e-12 * max(
            map(abs, all_scores.values())
        )
    one = unroll(influence, run, "--sum-queries").rows
    for row in one:
        mean = sum(all_scores[str(query), row["train"]] for query in range(5)) / 5
        assert abs(float(row["score"]) - mean) < 1e-12


def test_of_a_linear_model_gauss_newton_is_the_hessian_and_of_others_not(tmp_path, influence):
    linear = OUTPUTS.replace(
        "nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))", "nn.Linear(4, 3)"
    )
    for definition, alike in ((linear, True), (OUTPUTS, False)):
        run = train(tmp_path / str(alike), definition=definition)
        scores = [
            torch.tensor(
                [
                    float(row["score"])
                    for row in sorted(
                        unroll(influence, run, "--curvature", how).rows, key=lambda r: r["train"]
                    )
                ]
            )
            for how in ("hessian", "gauss-newton")
        ]
        difference = float(
            (scores[0].sort().values - scores[1].sort().values).abs().max() / scores[0].abs().max()
        )
        assert (difference < 1e-6) == alike
    refused(
        unroll(influence, train(tmp_path / "without"), "--curvature", "gauss-newton"),
        1,
        "lacks outputs() and loss_from_outputs()",
    )


def test_nothing_but_the_queries_is_cached(tmp_path, influence):
    run = train(tmp_path / "run")
    assert unroll(influence, run).code == 0
    assert not list((run / ".influence").rglob("train/*.safetensors"))
    assert not (run / ".influence" / "back").exists() or not list(
        (run / ".influence" / "back").iterdir()
    )


def test_a_training_that_was_not_as_recorded_is_refused_with_what_may_differ(tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    path = run / "trajectory.jsonl"
    head, *lines = path.read_text().splitlines()
    changed = [json.dumps(json.loads(line) | {"examples": [1, 2, 3, 4]}) for line in lines]
    path.write_text("\n".join([head, *changed]) + "\n")
    refused(
        unroll(influence, run, "--replay"),
        1,
        "does not reproduce checkpoints/step-000012",
        "dropout or BatchNorm",
    )


def test_a_killed_job_goes_on_where_it_was_and_leaves_nothing(tmp_path, influence):
    run = train(tmp_path / "run", kind=ADAMW, rate=0.05, every=4)
    complete_output = unroll(influence, run, "--replay", "--by", "step", "--cache", "none").out
    add = resume.PassProgress.add

    def add_or_die(self, adjoint, effects):
        if effects.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        add(self, adjoint, effects)

    def prepare():
        resume.SAVE_SECONDS = 0
        resume.PassProgress.add = add_or_die

    command = ("score", run, "--method", "unroll", "--replay", "--by", "step", "--top", "all")
    done = run_fork(*command, place=tmp_path, prepare=prepare)
    assert done.code == -signal.SIGKILL, done.err
    assert len(list((run / ".influence" / "back").rglob("scores-*.safetensors"))) == 6
    result = unroll(influence, run, "--replay", "--by", "step")
    assert "resuming below step 6" in result.err
    assert result.out == complete_output
    assert not list((run / ".influence" / "back").iterdir())


@pytest.mark.parametrize("flags", [(), ("--replay",)], ids=["stored", "replay"])
def test_a_job_killed_after_its_last_step_resumes_without_a_step(
    flags, tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run")
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0)
    with monkeypatch.context() as patch:
        patch.setattr(resume.PassProgress, "discard", lambda self: None)
        complete_output = unroll(influence, run, *flags).out
    result = unroll(influence, run, *flags)
    assert result.code == 0
    assert "resuming below step 0" in result.err
    assert result.out == complete_output


def test_a_job_of_another_question_does_not_go_on_with_it(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run")
    monkeypatch.setattr(resume, "SAVE_SECONDS", 0)
    monkeypatch.setattr(resume.PassProgress, "discard", lambda self: None)
    unroll(influence, run)
    for flags in (
        ("--queries", "0:2"),
        ("--layers", "0"),
        ("--at", "6"),
        ("--renormalize",),
        ("--replay",),
        ("--by", "layer"),
    ):
        assert "resuming" not in unroll(influence, run, *flags).err
    assert "resuming below step 0" in unroll(influence, run).err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--form", "query"), "--form does not apply to --method unroll"),
        (("--embeddings", "there"), "--embeddings does not apply to --method unroll"),
        (("--curvature", "fisher"), "expected: hessian, gauss-newton"),
        (("--normalize",), "not inner products"),
    ],
)
def test_flags_of_other_methods_are_refused(flags, says, tmp_path, influence):
    refused(unroll(influence, train(tmp_path / "run"), *flags), 2, says)


def test_trace_and_tsloo_take_it(tmp_path, influence):
    run = train(tmp_path / "run", every=6, kind=ADAM, rate=0.05)
    result = influence(
        "trace", run, "--method", "unroll", "--replay", "--queries", "1", "--format", "csv"
    )
    assert result.code == 0
    assert len(result.rows) == 12
    result = influence(
        "evaluate",
        run,
        "tsloo",
        "--method",
        "unroll",
        "--replay",
        "--removals",
        "12",
        "--format",
        "csv",
    )
    assert result.code == 0
    assert result.rows[0]["figure"] == "spearman"
    assert float(result.rows[0]["value"]) > 0.9


def test_what_is_wrong_with_a_saved_optimizer_state_is_said(tmp_path, influence):
    run = train(tmp_path / "run", kind=ADAM, rate=0.05, every=4, states=True)
    path = run / "optimizer" / "step-000004.safetensors"
    content = path.read_bytes()
    flags = ("--replay", "--steps", "4:")
    path.write_bytes(content[:200])
    refused(unroll(influence, run, *flags), 1, "optimizer/step-000004.safetensors can't be read")
    state = load_file_of(content)
    save_file(
        state | {"exp_avg_sq/0.bias": -state["exp_avg_sq/0.bias"] - 1},
        str(path),
        {"optimizer": "adam", "numbers": "[]"},
    )
    refused(
        unroll(influence, run, *flags), 1, "exp_avg_sq of 0.bias is not finite, or a square below 0"
    )
    save_file(state, str(path), {"optimizer": "sgd", "numbers": "[]"})
    refused(unroll(influence, run, *flags), 1, "is of another optimizer: sgd")


def test_inspect_says_what_it_costs_in_trainings_and_no_gradients_of_training_examples(
    tmp_path, influence
):
    run = train(tmp_path / "run", kind=ADAMW, rate=0.05, every=4)
    result = influence("inspect", run, "--method", "unroll", "--replay", "--lr", "1")
    assert result.code == 0
    assert "trainings of its 12 steps for 5 queries, 1 of them to re-run the steps" in result.out
    assert "moment estimates" not in result.err
    assert "  train" not in result.out.split("gradients")[1].split("setting")[0]
    assert "(here at most 4 steps)" in unroll(influence, train(tmp_path / "sgd", every=4)).err
