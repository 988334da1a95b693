"""influence evaluate RUN tsloo against retraining written out, and that nothing of it is lost or done twice."""

import json
import re

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


def without_seconds(table: str) -> str:
    return re.sub(r'"([0-9]+ trainings), [0-9.]+ s"', r"\1", table)


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


def test_the_table_has_the_mean_over_queries_with_interval_and_cost_and_dve_beats_tracin(
    tmp_path, influence
):
    run = train(tmp_path / "run", steps=30, rate=0.5)
    flags = ("tsloo", "--removals", "60", "--method", "dve", "--method", "tracin")
    result = influence("evaluate", run, *flags)
    assert result.code == 0, result.err
    columns = ["method", "protocol", "figure", "value", "low", "high", "n", "cost"]
    assert list(result.rows[0]) == columns
    correlations = ("spearman", "pearson", "pooled-spearman", "pooled-pearson")
    expected = [(method, name) for method in ("dve", "tracin") for name in correlations]
    expected += [("retraining", "effect"), ("retraining", "noise")]
    assert [(row["method"], row["figure"]) for row in result.rows] == expected
    rows = {(row["method"], row["figure"]): row for row in result.rows}
    dve, tracin = rows["dve", "spearman"], rows["tracin", "spearman"]
    assert float(dve["value"]) > 0.8 > float(tracin["value"])
    assert float(dve["low"]) < float(dve["value"]) < float(dve["high"])
    assert (dve["n"], rows["dve", "pooled-spearman"]["n"]) == ("5", "300")
    noise, effect = rows["retraining", "noise"]["value"], rows["retraining", "effect"]["value"]
    assert float(noise) < 1e-12 < float(effect)
    assert re.fullmatch(r"62 trainings, [0-9.]+ s", dve["cost"])


def test_by_query_adds_a_row_for_each_query(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    without = evaluate(influence, run).rows
    result = evaluate(influence, run, "--by", "query")
    assert list(result.rows[0])[2:4] == ["figure", "query"]
    of_dve = [row for row in result.rows if row["figure"] == "spearman"]
    assert [row["query"] for row in of_dve] == ["0", "1", "2", "3", "4", "all"]
    values = [float(row["value"]) for row in of_dve]
    assert values[-1] == pytest.approx(np.mean(values[:-1]))
    assert [row["n"] for row in of_dve] == ["10"] * 5 + ["5"]
    rows = [{k: v for k, v in row.items() if k != "query"} for row in result.rows]
    assert [row for row in rows if row in without] == without  # cost too: it is stored


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
    assert without_seconds(evaluate(influence, run).out) == without_seconds(whole)
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


def test_two_processes_divide_the_removals(tmp_path, influence, monkeypatch):
    run = train(tmp_path / "run", every=4)
    alone = evaluate(influence, run, "--cache", tmp_path / "alone").out
    (stored_alone,) = (tmp_path / "alone" / "evaluate").glob("*.jsonl")
    others = stored_alone.read_text().splitlines(keepends=True)[1:]
    calls = []
    original = Replay.advance

    def beside_another_process(self, stop, drop=None, *arguments, **options):
        result = original(self, stop, drop, *arguments, **options)
        if drop:
            calls.append(1)
            with next((run / ".influence" / "evaluate").glob("*.jsonl")).open("a") as log:
                log.write(others.pop(0))  # it has removed another example meanwhile, or the same
        return result

    monkeypatch.setattr(Replay, "advance", beside_another_process)
    assert without_seconds(evaluate(influence, run).out) == without_seconds(alone)
    assert 4 < len(calls) < 10


def test_a_changed_result_is_refused_and_one_of_an_older_version_is_read(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    whole = evaluate(influence, run).out
    path = next((run / ".influence" / "evaluate").glob("*.jsonl"))
    text = path.read_text()
    path.write_text(text.replace('"truth": [', '"truth": [1', 1))
    refused(evaluate(influence, run), 1, "line 2 can't be read: it differs from its checksum")
    old = [
        {k: v for k, v in json.loads(line).items() if k not in ("crc32", "seconds")}
        for line in text.splitlines()
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    assert evaluate(influence, run).out == without_seconds(whole)  # it stored no seconds
    old[1].pop("example")
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    refused(evaluate(influence, run), 1, "a damaged record: KeyError 'example'", "delete")


def test_results_from_another_optimizer_state_are_not_used(tmp_path, influence):
    run = train(tmp_path / "run", every=4, kind=torch.optim.Adam, rate=0.05, states=True)
    (run / "checkpoints" / "step-000000.safetensors").unlink()
    before = evaluate(influence, run, "--method", "random").out
    change_state(run, 4)
    after = evaluate(influence, run, "--method", "random").out
    anew = evaluate(influence, run, "--method", "random", "--cache", "none").out
    assert without_seconds(after) == without_seconds(anew) != without_seconds(before)


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
    "tsloo --by layer": ("--by layer does not apply to tsloo", "expected: query"),
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
