"""DVE through the real command against whole Jacobians on batch-size-one autograd, float64."""

import errno
import json
import os
import shutil
from collections import defaultdict

import pytest
import torch

from tests.refusals import refused
from tests.training import expected, summed, train


def scores(result, queries=5, count=24, part=None):
    """(Q, N) from a table of `--top all`, or of one part of each score."""
    assert result.code == 0, result.err
    actual = torch.zeros(queries, count, dtype=torch.float64)
    for row in result.rows:
        if part is None or row[part[0]] == part[1]:
            actual[int(row["query"]), int(row["train"])] += float(row["score"])
    return actual


def close(actual, expected_scores, tolerance=1e-9):
    assert (actual - expected_scores).abs().max() < tolerance * expected_scores.abs().max()


def dve(influence, run, *flags):
    return influence("score", run, "--method", "dve", "--top", "all", *flags)


GROUPS = (
    {"params": ["0.weight", "0.bias"], "lr": 0.5},
    {"params": ["2.weight", "2.bias"], "weight_decay": 0.0},
)
TRAININGS = {
    "every step saved": {},
    "sum": {"reduction": "sum", "rate": 0.05},
    "weights of each entry": {"weights": True},
    "three checkpoints": {"every": 5},
    "momentum, weight decay": {
        "options": {"momentum": 0.9, "weight_decay": 0.05},
        "rate": 0.05,
        "every": 4,
    },
    "nesterov": {
        "options": {"momentum": 0.8, "weight_decay": 0.05, "nesterov": True},
        "rate": 0.05,
    },
    "clipped": {"clip": lambda norm: min(1.0, 0.3 / norm)},
    "clipped, momentum, sparse": {
        "clip": lambda norm: min(1.0, 0.5 / norm),
        "options": {"momentum": 0.9},
        "rate": 0.05,
        "every": 4,
    },
    "groups of two rates": {"groups": GROUPS},
    "batches of other lengths, an example twice": {
        "batches": lambda t: [t % 24, 3, 3, *range(t % 3)],
        "every": 3,
    },
}


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_scores_are_the_references(training, tmp_path, influence):
    run = train(tmp_path / "run", **training)
    options = training.get("options", {})
    wanted = expected(
        run,
        momentum=options.get("momentum", 0),
        decay=options.get("weight_decay", 0),
        nesterov="nesterov" in options,
    )
    close(scores(dve(influence, run)), summed(wanted, 24))


def test_groups_have_their_own_momentum_and_decay(tmp_path, influence):
    groups = (
        {"params": ["0.weight", "0.bias"], "momentum": 0.9, "nesterov": True},
        {"params": ["2.weight", "2.bias"], "weight_decay": 0.1},
    )
    run = train(tmp_path / "run", groups=groups, every=3, rate=0.1)
    first = (torch.arange(27) < 15).double()  # the numbers of the first layer
    wanted = expected(run, momentum=0.9 * first, decay=0.1 * (1 - first), nesterov=first)
    close(scores(dve(influence, run)), summed(wanted, 24))


def test_a_parameter_in_no_group_was_never_trained_and_does_not_count(tmp_path, influence):
    run = train(tmp_path / "run", groups=({"params": ["0.weight", "2.weight"]},))
    result = dve(influence, run)
    assert "never trained, by the trajectory's groups: 0.bias, 2.bias" in result.err
    close(scores(result), summed(expected(run, names=["0.weight", "2.weight"]), 24))
    refused(
        dve(influence, run, "--layers", "*.bias"), 2, "none of the selected parameters was trained"
    )


def test_without_curvature_only_the_optimizer_acts(tmp_path, influence):
    run = train(tmp_path / "run", options={"weight_decay": 0.1})
    close(
        scores(dve(influence, run, "--curvature", "none")),
        summed(expected(run, decay=0.1, curved=False), 24),
    )


def test_curvature_couples_all_selected_parameters(tmp_path, influence):
    run = train(tmp_path / "run")
    parts = scores(dve(influence, run, "--layers", "0")) + scores(
        dve(influence, run, "--layers", "2")
    )
    together = scores(dve(influence, run))
    close(
        scores(dve(influence, run, "--layers", "0")),
        summed(expected(run, names=["0.weight", "0.bias"]), 24),
    )
    assert (parts - together).abs().max() > 1e-3 * together.abs().max()


def test_by_layer_splits_the_entrys_gradient_and_not_the_curvature(tmp_path, influence):
    run = train(tmp_path / "run")
    result = dve(influence, run, "--by", "layer")
    for layer in ("0", "2"):
        close(
            scores(result, part=("layer", layer)),
            summed(expected(run, sources=[f"{layer}.weight", f"{layer}.bias"]), 24),
        )
    close(scores(result), summed(expected(run), 24))


def test_by_step_has_a_row_for_each_occurrence(tmp_path, influence):
    run = train(tmp_path / "run", batches=lambda t: [t % 5, 3, 3])
    wanted = expected(run)
    result = dve(influence, run, "--by", "step", "--queries", "2")
    assert list(result.rows[0])[:5] == ["query", "kind", "rank", "train", "step"]
    by_hand = defaultdict(float)
    for step, examples, values in wanted:
        for example, row in zip(examples, values, strict=True):
            by_hand[step, example] += float(row[2])
    by_table = {(int(row["step"]), int(row["train"])): float(row["score"]) for row in result.rows}
    assert by_table.keys() == by_hand.keys()
    assert max(abs(by_table[key] - by_hand[key]) for key in by_table) < 1e-12


def test_by_checkpoint_sums_the_steps_of_a_segment(tmp_path, influence):
    run = train(tmp_path / "run", every=5)
    result = dve(influence, run, "--by", "checkpoint")
    for first, last in ((0, 5), (5, 10), (10, 12)):
        wanted = summed(
            [
                step if first <= step[0] < last else (*step[:2], step[2] * 0)
                for step in expected(run)
            ],
            24,
        )
        close(scores(result, part=("checkpoint", str(first))), wanted)


# ---------------------------------------------------------------- the forms
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.05, "nesterov": True}


@pytest.mark.parametrize("options", [{}, MOMENTUM], ids=["sgd", "nesterov"])
def test_query_form_is_embedding_form_and_parts_are_the_whole(
    options, tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", steps=90, every=30, rate=0.02, options=options)
    query = scores(dve(influence, run, "--form", "query"))
    parts = scores(dve(influence, run, "--embeddings", tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("part-*"))) >= 3
    monkeypatch.setattr(
        "influence_cli.methods.reverse.embedding_store.cut_parts", lambda plan, size: [(0, 90)]
    )
    one_part = scores(dve(influence, run, "--form", "embedding"))
    close(parts, query, 1e-8)
    close(parts, one_part, 1e-10)


def test_embeddings_answer_later_queries_without_a_training_gradient(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    first = scores(dve(influence, run, "--embeddings", tmp_path / "kept", "--queries", "0:2"))
    shutil.rmtree(run / ".influence")
    later = scores(dve(influence, run, "--embeddings", tmp_path / "kept"))
    assert not list((run / ".influence").rglob("train"))
    close(later[:2], first[:2], 1e-12)
    close(later, summed(expected(run), 24), 1e-8)


def test_embeddings_that_were_cut_off_go_on_and_give_the_same_bytes(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    complete_output = dve(influence, run, "--embeddings", tmp_path / "kept").out
    part = min((tmp_path / "kept").glob("part-*"))
    (part / "map.safetensors").unlink()
    min(part.glob("rows-*")).write_bytes(b"half a file")
    assert dve(influence, run, "--embeddings", tmp_path / "kept").out == complete_output


def test_a_damaged_file_of_embeddings_is_refused_and_made_again_once_deleted(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    complete_output = dve(influence, run, "--embeddings", tmp_path / "kept").out
    for path in (
        min((tmp_path / "kept").glob("part-*/rows-*")),
        max((tmp_path / "kept").glob("part-*/map*")),
    ):
        path.write_bytes(path.read_bytes()[:-8])
        refused(
            dve(influence, run, "--embeddings", tmp_path / "kept"),
            1,
            path.name,
            "is damaged",
            "delete it",
        )
        path.unlink()
        assert dve(influence, run, "--embeddings", tmp_path / "kept").out == complete_output


def test_embeddings_of_something_else_are_refused(tmp_path, influence):
    run = train(tmp_path / "run", steps=20, every=10)
    assert dve(influence, run, "--embeddings", tmp_path / "kept").code == 0
    other = dve(influence, run, "--embeddings", tmp_path / "kept", "--curvature", "none")
    refused(
        other,
        1,
        "holds embeddings of another run or request: curvature differs",
        "--embeddings DIR",
    )
    fewer = dve(influence, run, "--embeddings", tmp_path / "kept", "--steps", "0,20")
    refused(fewer, 1, "checkpoints differs")
    text = (run / "definition.py").read_text()
    (run / "definition.py").write_text(text + "# a comment\n")
    assert (
        "training gradients are the same"
        in dve(influence, run, "--embeddings", tmp_path / "kept").err
    )
    (run / "definition.py").write_text(text.replace('reduction="none")', 'reduction="none") * 2'))
    refused(
        dve(influence, run, "--embeddings", tmp_path / "kept", "--cache", "none"),
        1,
        "belongs to another run",
    )


def test_at_explains_a_checkpoint_in_both_forms(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=20, rate=0.1)
    wanted = summed(expected(run, end=40), 24)
    close(scores(dve(influence, run, "--at", "40")), wanted)
    assert dve(influence, run, "--embeddings", tmp_path / "kept").code == 0
    assert any(path.name.endswith("-000040") for path in (tmp_path / "kept").iterdir())
    close(
        scores(dve(influence, run, "--at", "40", "--embeddings", tmp_path / "kept")), wanted, 1e-8
    )


# ---------------------------------------------------------------- the store
def test_cells_that_tracin_cached_are_reused(tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    assert influence("score", run, "--lr", "1").code == 0
    before = sorted(path for path in (run / ".influence").rglob("*.safetensors"))
    close(scores(dve(influence, run)), summed(expected(run), 24))
    assert sorted(path for path in (run / ".influence").rglob("*.safetensors")) == before


def test_only_the_examples_of_a_segment_are_taken_at_its_checkpoint(tmp_path, influence):
    run = train(tmp_path / "run", every=6, batches=lambda t: [0, 1] if t < 6 else [7, 20])
    assert dve(influence, run).code == 0
    units = {
        path.parts[-4].split("-")[1]: path.stem
        for path in (run / ".influence").rglob("train/*/*.safetensors")
    }
    assert set(units) == {"000000000", "000000006", "000000012"}  # the last: a few for the drift
    assert all(len(name.split("-")) == 3 for name in units.values())  # units of some examples


def test_without_a_cache_the_scores_are_the_same(tmp_path, influence):
    run = train(tmp_path / "run", every=4, options={"momentum": 0.5})
    assert dve(influence, run, "--cache", "none").out == dve(influence, run).out


def test_memory_for_few_rows_and_few_queries_gives_the_same_scores(
    tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=4)
    all_scores = scores(dve(influence, run))
    monkeypatch.setattr("influence_cli.methods.reverse.fisher_steps.ROWS_BYTES", 1)
    monkeypatch.setattr("influence_cli.methods.reverse.reverse_pass.QUERY_BYTES", 1)
    monkeypatch.setattr("influence_cli.methods.reverse.occurrences.MEMORY_BYTES", 0)
    close(scores(dve(influence, run)), all_scores, 1e-12)
    close(scores(dve(influence, run, "--by", "step")), all_scores, 1e-12)


def test_scores_that_a_disk_refuses_are_named_with_its_reason(tmp_path, influence, monkeypatch):
    def refuse(path, shape):
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    run = train(tmp_path / "run", every=4)
    monkeypatch.setattr("influence_cli.methods.reverse.occurrences.MEMORY_BYTES", 0)
    monkeypatch.setattr("influence_cli.methods.reverse.occurrences.map_zeros", refuse)
    result = influence("score", run, "--method", "dve")
    assert result.code == 1
    assert "bytes of scores can't be written to" in result.err
    assert result.err.splitlines()[-2].endswith(": Input/output error")


# ---------------------------------------------------------------- what a request selects
def test_train_limits_the_rows_and_never_the_curvature(tmp_path, influence):
    run = train(tmp_path / "run")
    all_scores = scores(dve(influence, run))
    selected = scores(dve(influence, run, "--train", "3,10:12"))
    close(selected[:, [3, 10, 11]], all_scores[:, [3, 10, 11]], 1e-12)
    assert selected.count_nonzero() <= 15


def test_groups_and_the_mean_of_all_queries(tmp_path, influence):
    run = train(tmp_path / "run")
    all_scores = scores(dve(influence, run))
    mean = dve(influence, run, "--sum-queries")
    of_mean_query = torch.zeros(24, dtype=torch.float64)
    for row in mean.rows:
        of_mean_query[int(row["train"])] = float(row["score"])
    close(of_mean_query, all_scores.mean(0))
    grouped = {
        (row["query"], row["train"]): float(row["score"])
        for row in dve(influence, run, "--group-by", "label").rows
    }
    labels = [
        row["train_label"]
        for row in sorted(
            dve(influence, run, "--queries", "0").rows, key=lambda row: int(row["train"])
        )
    ]
    assert grouped["0", "b"] == pytest.approx(
        float(all_scores[0][[i for i, label in enumerate(labels) if label == "b"]].sum())
    )
    by_step = dve(influence, run, "--group-by", "label", "--by", "step", "--queries", "0")
    assert sum(float(row["score"]) for row in by_step.rows if row["train"] == "b") == pytest.approx(
        grouped["0", "b"]
    )


def test_the_later_line_of_a_step_counts(tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    path = run / "trajectory.jsonl"
    text = path.read_text().splitlines(keepends=True)
    wanted = dve(influence, run).out
    given_up = [
        json.dumps(json.loads(line) | {"examples": [0, 0, 0, 0]}) + "\n" for line in text[4:9]
    ]
    path.write_text("".join([*text[:4], *given_up, *text[4:]]))
    assert dve(influence, run).out == wanted


def test_renormalized_the_scores_of_a_step_are_centred(tmp_path, influence):
    run = train(tmp_path / "run", batch=6)
    kept, shared = (
        dve(influence, run, "--by", "step", "--queries", "1", *flags)
        for flags in ((), ("--renormalize",))
    )
    for step in range(12):
        plain, centred = (
            [float(r["score"]) for r in result.rows if r["step"] == str(step)]
            for result in (kept, shared)
        )
        ids = [
            [r["train"] for r in result.rows if r["step"] == str(step)] for result in (kept, shared)
        ]
        by_id = dict(zip(ids[0], plain, strict=True))
        assert centred == pytest.approx([(by_id[i] - sum(plain) / 6) * 6 / 5 for i in ids[1]])


def test_steps_outside_the_checkpoints_are_announced(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    (run / "checkpoints" / "step-000000.safetensors").unlink()
    (run / "checkpoints" / "step-000012.safetensors").unlink()
    result = dve(influence, run)
    assert "steps 8 to 11 come after the last checkpoint" in result.err
    assert (
        "steps 0 to 3 come before the first checkpoint and have the gradients of "
        "checkpoints/step-000004.safetensors" in result.err
    )
    close(scores(result), summed(expected(run, steps=[4, 8]), 24))


def test_drift_is_reported_where_checkpoints_are_sparse_and_only_there(tmp_path, influence):
    assert (
        "drift: gradients of the same examples"
        in dve(influence, train(tmp_path / "sparse", every=4)).err
    )
    assert "drift" not in dve(influence, train(tmp_path / "dense")).err


# ------------------------------------------------ divergence, and requests that are refused
def test_an_unstable_step_is_named(tmp_path, influence):
    run = train(tmp_path / "run", steps=3, rate=0.3)
    path = run / "trajectory.jsonl"
    head, *lines = path.read_text().splitlines()
    loud = [
        json.dumps(json.loads(line) | ({"lr": 30.0} if k == 1 else {}))
        for k, line in enumerate(lines)
    ]
    path.write_text("\n".join([head, *loud]) + "\n")
    assert "1 step is unstable: at step 1 the curvature is" in dve(influence, run).err


def test_a_recursion_that_runs_away_is_an_error_and_never_a_number(tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    path = run / "trajectory.jsonl"
    head, *lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([head, *(json.dumps(json.loads(line) | {"lr": 60.0}) for line in lines)]) + "\n"
    )
    result = dve(influence, run)
    refused(result, 1, "diverged at step", "expected: at most 10,000-fold", "--replay")
    assert result.out == ""


def headed(run, **changes):
    path = run / "trajectory.jsonl"
    head, *lines = path.read_text().splitlines()
    path.write_text(
        "\n".join(
            [
                json.dumps(
                    {k: v for k, v in (json.loads(head) | changes).items() if v is not None}
                ),
                *lines,
            ]
        )
        + "\n"
    )


REFUSED_HEADERS = {
    "adam": (
        {"optimizer": {"name": "adam"}},
        "needs the moment estimates of adam at every step",
        "--replay recovers them",
    ),
    "adamw": (
        {"optimizer": {"name": "AdamW"}},
        "needs the moment estimates of adamw at every step",
        "--replay recovers them",
    ),
    "another optimizer": (
        {"optimizer": {"name": "lion"}},
        "dve has no adjoint for steps of lion",
        "expected: sgd",
    ),
    "no optimizer": ({"optimizer": None}, "the header names no optimizer", '"name": "sgd"'),
    "dampening": (
        {"optimizer": {"name": "sgd", "momentum": 0.9, "dampening": 0.1}},
        "dampening = 0.1 has no adjoint here",
    ),
    "maximize": (
        {"optimizer": {"name": "sgd", "maximize": True}},
        "maximize = True has no adjoint here",
    ),
    "momentum that is no number": (
        {"optimizer": {"name": "sgd", "momentum": "much"}},
        "momentum is 'much'",
    ),
    "no weights": (
        {"reduction": None},
        "step 11 has no weights, and the header no `reduction`",
        "mean",
    ),
    "a reduction of its own": (
        {"reduction": "tokens"},
        "reduction is 'tokens'",
        "weights in each line",
    ),
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [(head, says) for head, *says in REFUSED_HEADERS.values()],
    ids=REFUSED_HEADERS,
)
def test_a_trajectory_that_dve_cannot_go_back_over_is_refused_by_name(
    changes, says, tmp_path, influence
):
    run = train(tmp_path / "run")
    headed(run, **changes)
    refused(dve(influence, run), 1, *says)


def test_no_trajectory_shows_the_lines_that_record_one(tmp_path, influence):
    run = train(tmp_path / "run")
    (run / "trajectory.jsonl").unlink()
    refused(
        dve(influence, run), 1, "no trajectory", "TrajectoryRecorder(", "recorder.step(indices)"
    )


BAD_FLAGS = {
    "--at 5": ("--at 5: the run has no checkpoint of step 5", "0, 4, 8, 12"),
    "--at 0": ("from before the first step",),
    "--normalize": ("--normalize does not apply to --method dve", "loss changes"),
    "--lr 1": ("--lr does not apply to --method dve", "no learning-rate weights"),
    "--curvature hessian": (
        "--curvature hessian does not apply to --method dve",
        "expected: fisher, none",
        "methods that have --curvature hessian: influence, unroll",
    ),
    "--curvature exact": ("--curvature exact: unknown", "fisher, none"),
    "--form both": ("--form both: unknown", "query, embedding"),
    "--form query --embeddings DIR": ("--form query does not combine with --embeddings",),
    "--form embedding --by layer": ("--by layer: embeddings are sums over the layers",),
    "--by word": ("--by word: the scores of dve have no such parts", "step, checkpoint, layer"),
    "--method tracin --at 4": (
        "--at does not apply to --method tracin",
        "leave out --at",
        "methods that have --at: dve, unroll",
    ),
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_flags_that_dve_cannot_take_are_refused(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    refused(
        influence(
            "score", run, "--method", "dve", *flags.replace("DIR", str(tmp_path / "kept")).split()
        ),
        2,
        *BAD_FLAGS[flags],
    )


def test_an_embedding_form_that_does_not_fit_is_refused_before_any_work(
    tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=4)
    monkeypatch.setattr(
        "influence_cli.methods.reverse.embedding_build.available_memory", lambda: 1000
    )
    result = dve(influence, run, "--form", "embedding")
    refused(result, 2, "the embedding form propagates 27 x 27 numbers", "--form query")


def test_at_and_steps_choose_together(tmp_path, influence):
    run = train(tmp_path / "run", steps=60, every=10, rate=0.1)
    flags = ("--steps", "0,20,40,60", "--at", "40")
    kept = scores(dve(influence, run, *flags, "--embeddings", tmp_path / "kept"))
    close(kept, summed(expected(run, steps=[0, 20, 40]), 24), 1e-8)
    close(scores(dve(influence, run, *flags)), kept, 1e-8)


def test_inspect_says_what_dve_would_take(tmp_path, influence):
    run = train(tmp_path / "run", every=6, batches=lambda t: [0, 1, 7] if t < 6 else [7, 20])
    before = influence("inspect", run, "--lr", "1")
    assert "trajectory: 12 steps of sgd, 30 occurrences" in before.err
    row = next(line for line in before.out.splitlines() if "train, for dve" in line)
    assert row.split()[3:7] == [
        "4",
        "5",
        "0",
        "5",
    ]  # examples, pairs with checkpoints, cached, to compute
    assert dve(influence, run).code == 0
    row = next(
        line
        for line in influence("inspect", run, "--lr", "1").out.splitlines()
        if "train, for dve" in line
    )
    assert row.split()[3:7] == ["4", "5", "5", "0"]
    headed(run, optimizer={"name": "adam"})
    assert (
        "for --method dve: dve needs the moment estimates of adam at every step"
        in influence("inspect", run, "--lr", "1").err
    )
