"""dve and unroll at the edge of what floats hold, against float64 autograd (faults/numeric_runs.py)."""

import pytest
import torch

from faults.numeric_runs import NumericRun, Reference, build_numeric_run
from tests.refusals import refused


def scores_of(influence, run, method, *flags):
    result = influence("score", run, "--method", method, "--top", "all", *flags)
    assert result.code == 0, result.err
    scores = torch.zeros(5, 17, dtype=torch.float64)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] += float(row["score"])
    return scores


@pytest.mark.parametrize(
    ("method", "flags", "exponents"),
    [
        ("dve", (), (-30, -20)),
        ("dve", ("--by", "layer"), (-30,)),
        ("dve", ("--replay",), (-30,)),
        ("dve", ("--form", "embedding"), (-30,)),
        ("unroll", (), (-30, -20, 20, 30)),
        ("unroll", ("--replay",), (30,)),
    ],
    ids=str,
)
def test_scores_of_scaled_losses_are_those_of_autograd(
    method, flags, exponents, tmp_path, influence
):
    # the learning rate is divided by the scale, so the training is the same. float32 keeps 1e-7;
    # a few steps add up
    for exponent in exponents:
        numeric = NumericRun(exponent=exponent)
        run = build_numeric_run(numeric, tmp_path / f"{exponent}")
        expected, sizes = Reference(numeric, run).scores(method)
        scores = scores_of(influence, run, method, *flags)
        assert bool(((scores - expected).abs() <= 2e-6 * sizes).all()), exponent


def test_dve_whose_curvature_is_too_large_is_refused(tmp_path, influence):
    # the empirical Fisher grows with the square of the loss: this reverse pass diverges
    run = build_numeric_run(NumericRun(exponent=30), tmp_path / "run")
    result = influence("score", run, "--method", "dve")
    assert result.code == 1
    assert result.err.count("error: backpropagating through training") == 1


def test_a_pass_over_tiny_gradients_resumes(tmp_path, influence, monkeypatch):
    from influence_cli.errors import InfluenceError
    from influence_cli.methods.reverse import resume

    numeric = NumericRun(exponent=-30)
    complete = build_numeric_run(numeric, tmp_path / "complete")
    run = build_numeric_run(numeric, tmp_path / "run")
    add = resume.PassProgress.add

    def add_and_fail(self, adjoint, effects):
        add(self, adjoint, effects)
        if effects.step == 2:
            raise InfluenceError("killed")

    monkeypatch.setattr(resume, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(resume.PassProgress, "add", add_and_fail)
    assert influence("score", run, "--method", "unroll").code == 1
    monkeypatch.setattr(resume.PassProgress, "add", add)
    result = influence("score", run, "--method", "unroll")
    assert "resuming below step 2" in result.err
    assert result.out == influence("score", complete, "--method", "unroll").out


@pytest.mark.parametrize("command", ["score", "trace"])
def test_effects_past_float64_are_refused(command, tmp_path, influence):
    run = build_numeric_run(NumericRun(exponent=140), tmp_path / "run")
    lines = (run / "trajectory.jsonl").read_text().replace("e-141", "e+31")
    (run / "trajectory.jsonl").write_text(lines)
    flags = ("--method", "dve", "--curvature", "none", "--precision", "float64")
    result = influence(command, run, *flags)
    refused(result, 1, "backpropagating through training gave a number that is not finite")


@pytest.mark.parametrize("exponent", [-140, 140])
def test_evaluate_does_not_depend_on_the_scale_of_the_loss(exponent, tmp_path, influence):
    flags = ("tsloo", "--method", "unroll", "--removals", "8", "--precision", "float64")
    flags += ("--by", "query")
    rows = []
    for exponent_of_run in (0, exponent):
        numeric = NumericRun(exponent=exponent_of_run)
        run = build_numeric_run(numeric, tmp_path / f"{exponent_of_run}")
        result = influence("evaluate", run, *flags)
        assert result.code == 0, result.err
        rows.append({(row["figure"], row["query"]): row["value"] for row in result.rows})
    assert len(rows[0]) == 26
    for (figure, query), plain in rows[0].items():
        scaled = rows[1][figure, query]
        if "spearman" in figure:
            # one removal can take another rank where two effects are equal up to rounding
            assert abs(float(plain) - float(scaled)) < 0.02
        if figure == "effect":
            assert float(scaled) / 10.0**exponent == pytest.approx(float(plain), rel=1e-6)
    assert 0 < float(rows[1]["noise", "all"]) < float("inf")


def test_evaluate_refuses_scores_that_are_not_finite(tmp_path, influence):
    run = build_numeric_run(NumericRun(), tmp_path / "run")
    flags = ("--removals", "4", "--lr", "1e308", "--precision", "float64")
    extra = "\ndef measure(model, batch):\n    return loss(model, batch) * -1e20\n"
    (run / "definition.py").write_text(NumericRun(extra=extra).definition)
    result = influence("evaluate", run, "tsloo", "--method", "tracin", *flags)
    refused(result, 1, "the score of training example")


@pytest.mark.parametrize("momentum", ["", ', "momentum": 0.9'])
@pytest.mark.parametrize("flags", [("dve",), ("dve", "--replay"), ("unroll",)], ids=str)
def test_a_learning_rate_past_float32_is_refused_or_right(flags, momentum, tmp_path, influence):
    # torch refuses it with a RuntimeError where it is an argument of an operation
    run = build_numeric_run(NumericRun(exponent=-44), tmp_path / "run")
    lines = (run / "trajectory.jsonl").read_text().replace('"sgd"', f'"sgd"{momentum}')
    assert "e+43" in lines
    (run / "trajectory.jsonl").write_text(lines)
    result = influence("score", run, "--method", *flags)
    assert "Traceback" not in result.err
    assert "RuntimeError" not in result.err
    if momentum or "--replay" in flags:
        assert result.code == 1
        says = "can't make step" if "--replay" in flags else "gave a number that is not finite"
        assert says in result.err
