"""influence evaluate RUN tsloo against retraining written out, and that nothing of it is lost or done twice."""

import json

import numpy as np
import pytest
import torch

from influence_cli.evaluate import step_removals
from influence_cli.evaluate.correlation import interval, pearson, ranks, spearman
from influence_cli.run.replay import Replay
from tests.refusals import refused
from tests.training import change_state, definition_of, load, train


def evaluate(influence, run, *flags):
    return influence("evaluate", run, "tsloo", "--removals", "10", *flags)


def test_the_truth_is_that_of_retraining_written_out(tmp_path, influence):
    run = train(tmp_path / "run", every=12)
    assert evaluate(influence, run).code == 0
    records = [
        json.loads(line)
        for line in next((run / ".influence" / "evaluate").glob("*.jsonl")).read_text().splitlines()
    ]
    base, removals = records[0], records[1:]
    assert len(removals) == 10
    space = definition_of(run)
    data, queries = space["train_data"](), space["query_data"]().tensors
    lines = [json.loads(line) for line in (run / "trajectory.jsonl").read_text().splitlines()[1:]]
    for removal in removals:
        model = space["model"]()
        load(model, run, 0)
        for line in lines:
            kept = [
                i
                for i in line["examples"]
                if (line["step"], i) != (removal["step"], removal["example"])
            ]
            loss = space["loss"](model, [tensor[kept] for tensor in data.tensors]).sum() / len(
                line["examples"]
            )
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                    parameter -= line["lr"] * gradient
        change = space["loss"](model, queries).detach().numpy() - np.array(base["values"])
        assert np.abs(change - np.array(removal["truth"])).max() < 1e-13


def test_the_table_has_each_query_their_mean_and_all_pairs_and_dve_beats_tracin(
    tmp_path, influence
):
    run = train(tmp_path / "run", steps=30, rate=0.5)
    result = influence(
        "evaluate", run, "tsloo", "--removals", "60", "--method", "dve", "--method", "tracin"
    )
    assert result.code == 0, result.err
    assert list(result.rows[0]) == [
        "method",
        "query",
        "spearman",
        "pearson",
        "removals",
        "effect",
        "noise",
        "query_label",
    ]
    rows = {(row["method"], row["query"]): row for row in result.rows}
    assert [query for method, query in rows if method == "dve"] == [
        "0",
        "1",
        "2",
        "3",
        "4",
        "mean",
        "pooled",
    ]
    by_query = [float(rows["dve", str(query)]["spearman"]) for query in range(5)]
    assert float(rows["dve", "mean"]["spearman"]) == pytest.approx(np.mean(by_query))
    assert float(rows["dve", "mean"]["spearman"]) > 0.8 > float(rows["tracin", "mean"]["spearman"])
    assert float(rows["dve", "pooled"]["noise"]) < 1e-12 < float(rows["dve", "pooled"]["effect"])


def test_a_stopped_evaluation_goes_on_and_more_removals_add_to_those_there(
    tmp_path, influence, monkeypatch
):
    run = train(tmp_path / "run", every=4)
    whole = evaluate(influence, run, "--cache", tmp_path / "whole").out
    calls: list[int] = []
    original = Replay.advance

    def counted(self, stop, drop=None, *args, **options):
        calls.append(drop is not None)
        if sum(calls) == 5:
            raise KeyboardInterrupt
        return original(self, stop, drop, *args, **options)

    monkeypatch.setattr(Replay, "advance", counted)
    assert evaluate(influence, run).code == 130
    path = next((run / ".influence" / "evaluate").glob("*.jsonl"))
    path.write_text(path.read_text() + '{"step": 3, "exam')
    monkeypatch.setattr(Replay, "advance", original)
    assert evaluate(influence, run).out == whole
    calls.clear()
    monkeypatch.setattr(
        Replay,
        "advance",
        lambda self, stop, drop=None, *a, **o: (
            calls.append(1) if drop else original(self, stop, drop, *a, **o)
        ),
    )
    assert evaluate(influence, run, "--method", "tracin", "--lr", "1").code == 0
    assert not calls
    assert influence("evaluate", run, "tsloo", "--removals", "13").code == 0
    assert len(calls) == 3


def test_a_changed_result_is_refused_and_one_of_an_older_version_is_read(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    whole = evaluate(influence, run).out
    path = next((run / ".influence" / "evaluate").glob("*.jsonl"))
    text = path.read_text()
    path.write_text(text.replace('"truth": [', '"truth": [1', 1))
    refused(evaluate(influence, run), 1, "line 2 can't be read: it differs from its checksum")
    old = [
        {key: value for key, value in json.loads(line).items() if key != "crc32"}
        for line in text.splitlines()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert evaluate(influence, run).out == whole
    old[1].pop("example")
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    refused(evaluate(influence, run), 1, "a damaged record: KeyError 'example'", "delete")


def test_results_from_another_optimizer_state_are_not_used(tmp_path, influence):
    run = train(tmp_path / "run", every=4, kind=torch.optim.Adam, rate=0.05, states=True)
    (run / "checkpoints" / "step-000000.safetensors").unlink()
    before = evaluate(influence, run, "--method", "random").out
    change_state(run, 4)
    after = evaluate(influence, run, "--method", "random").out
    assert after == evaluate(influence, run, "--method", "random", "--cache", "none").out != before


def test_fewer_removals_are_the_first_of_more():
    class Trajectory:
        lines = [type("Line", (), {"examples": np.array([1, 2, 2, 5])})] * 4

    few, more = (step_removals.draw_removals(Trajectory, range(4), number, 0) for number in (3, 9))
    assert more[:3] == few
    assert len(set(more)) == 9


def test_correlations_by_hand():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1, 3.5, 2]
    assert spearman(
        np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 16.0])
    ) == pytest.approx(1)
    assert spearman(
        np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    ) == pytest.approx(0.8)
    assert pearson(np.array([0.0, 1.0, 2.0]), np.array([1e-200, 0.0, 1e-200])) == pytest.approx(0)
    assert np.isnan(pearson(np.ones(3), np.arange(3.0)))
    low, high = interval(np.arange(100.0), 0)
    assert low < 49.5 < high


BAD = {
    "tsloo --removals 1": ("--removals 1", "from 2"),
    "tsloo --seed -1": ("--seed -1",),
    "loo": ("PROTOCOL loo: unknown", "tsloo"),
    "tsloo --method nothing": ("--method nothing: unknown",),
    "tsloo --lr 1": ("--method dve has no learning-rate weights",),
    "tsloo --steps 0": ("no step lies between",),
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags_are_refused(flags, tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    refused(influence("evaluate", run, *flags.split()), 2, *BAD[flags])


def test_a_run_that_cannot_be_trained_again_is_refused(tmp_path, influence):
    run = train(tmp_path / "run", every=6)
    (run / "trajectory.jsonl").rename(run / "other.jsonl")
    refused(evaluate(influence, run), 1, "this run has no trajectory", "--trajectory FILE")
    lines = (run / "other.jsonl").read_text().splitlines(keepends=True)
    (run / "trajectory.jsonl").write_text("".join(lines[:5]))
    refused(
        evaluate(influence, run),
        1,
        "trajectory.jsonl ends before checkpoints/step-000012.safetensors",
    )
