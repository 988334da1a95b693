"""The study of scores (benchmarks/study): its plan, its runs, and what it writes."""

import importlib
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parent.parent / "benchmarks" / "study"


@pytest.fixture
def study(monkeypatch):
    """A function that imports a file of the study, which is no package."""
    monkeypatch.syspath_prepend(str(STUDY))
    names = {path.stem for path in STUDY.glob("*.py")}
    for name in names & sys.modules.keys():
        monkeypatch.delitem(sys.modules, name)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_the_plan_names_runs_and_methods_that_exist(study):
    plan, runs = study("plan"), study("runs")
    assert [part.run for part in plan.PLANS]
    for part in plan.PLANS:
        assert part.run in runs.RUNS
        assert set(part.methods) | set(part.slow_methods) <= plan.METHODS.keys()


def test_a_run_is_trained_and_scored(study, tmp_path, influence):
    runs, plan = study("runs"), study("plan")
    run = tmp_path / "digits-adamw"
    runs.build_run(runs.RUNS["digits-adamw"], Path("no data"), run)
    for name in ("random", "dve --replay"):
        result = influence("score", run, *plan.METHODS[name], "--queries", "0")
        assert result.code == 0, result.err
        assert len(result.rows) == 20
    assert "reproduced" in result.err


def rows_of(run, method, protocol, figure, values):
    columns = dict(zip(("value", "low", "high"), map(str, values), strict=True))
    names = {"run": run, "method": method, "protocol": protocol, "figure": figure}
    return names | columns | {"n": "20", "cost": "42 trainings, 3 s"}


def test_the_tables_and_the_picture_have_every_value(study, tmp_path, monkeypatch):
    report = study("report")
    rows = [
        rows_of("digits-sgd", "unroll --replay", "lds 0.95", "spearman", (0.97, 0.96, 0.98)),
        rows_of("digits-sgd", "random", "lds 0.95", "spearman", (-0.01, -0.06, 0.05)),
        rows_of("gpt-sgd", "random", "lds 0.95", "spearman", (0.02, -0.01, 0.05)),
        rows_of("gpt-sgd", "retraining", "lds 0.95", "noise", (1e-7, 1e-7, 1e-7)),
        rows_of("digits-sgd", "random", "deletion", "proponents-auc", (-0.5, -0.6, -0.4)),
    ]
    page = tmp_path / "evaluation.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    report.write_report(rows)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| | gpt-sgd | digits-sgd |" in text  # in the order of the plan
    assert "| random | 0.02 ± 0.03 | -0.01 ± 0.06 |\n| unroll --replay |  | 0.97 ± 0.01 |" in text
    assert "| *noise* | 1e-07 |  |" in text
    picture = (tmp_path / "study.svg").read_text()
    assert picture.count("<svg") == 1
    assert "unroll --replay" in picture and "gpt-sgd" in picture
