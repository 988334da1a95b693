"""What dve, unroll and repsim say of zeros, small losses and half precision, as tracin does."""

import pytest

from faults.numeric_runs import FEATURES, MEASURE, POOL, NumericRun, build_numeric_run
from tests.refusals import refused

REVERSE = [("dve",), ("dve", "--replay"), ("dve", "--form", "embedding"), ("unroll",)]
ALL = list(range(POOL))


@pytest.fixture
def ask(tmp_path, influence):
    """ask(run, command, method, flags): the command on a new folder."""

    def call(numeric, command, *method_and_flags):
        run = build_numeric_run(numeric, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        return influence(command, run, "--method", *method_and_flags)

    return call


def zeros(train=(), query=(), **options):
    return NumericRun(zero={"train": list(train), "query": list(query)}, **options)


@pytest.mark.parametrize("split", ["train", "query"])
@pytest.mark.parametrize("method", [*REVERSE, ("tracin",)], ids=str)
def test_gradients_that_are_all_zero_are_refused(method, split, ask):
    result = ask(zeros(**{split: ALL}), "score", *method)
    refused(result, 1, f"every loss() and every gradient of {split}_data() is 0")


@pytest.mark.parametrize("method", REVERSE, ids=str)
def test_trace_refuses_gradients_that_are_all_zero(method, ask):
    refused(ask(zeros(train=ALL), "trace", *method), 1, "every gradient of train_data() is 0")


@pytest.mark.parametrize("split", ["train", "query"])
def test_features_that_are_all_zero_are_refused(split, ask):
    result = ask(zeros(**{split: ALL}, extra=FEATURES), "score", "repsim")
    refused(result, 1, f"every feature of {split}_data() is 0", "look at features()")


@pytest.mark.parametrize("method", [*REVERSE, ("tracin",), ("repsim",)], ids=str)
@pytest.mark.parametrize("flags", [(), ("--queries", "2")], ids=str)
def test_a_query_of_zeros_is_named(method, flags, ask):
    result = ask(zeros(query=[2], extra=FEATURES), "score", *method, *flags)
    assert result.code == 0, result.err
    says = "the features of query 2 are 0" if method == ("repsim",) else "gradient of query 2 is 0"
    assert result.err.count(says) == 1


def test_a_request_without_any_feature_is_accepted_if_others_have_some(ask):
    # the requested examples are zero, but the definition is fine
    result = ask(zeros(train=[0, 1], extra=FEATURES), "score", "repsim", "--train", "0:2")
    assert result.code == 0, result.err


def test_self_influence_of_zeros_is_accepted_if_other_examples_have_gradients(tmp_path, influence):
    run = build_numeric_run(zeros(train=[0, 1]), tmp_path / "run")
    result = influence("self", run, "--train", "0:2")
    assert result.code == 0, result.err
    assert [float(row["score"]) for row in result.rows] == [0, 0]


@pytest.mark.parametrize("method", [*REVERSE, ("tracin",)], ids=str)
def test_small_losses_are_counted(method, ask):
    result = ask(NumericRun(exponent=-7), "score", *method)
    assert "training examples have a loss below 1e-05" in result.err
    assert "queries have a loss below 1e-05" in result.err
    assert "have a loss below" not in ask(NumericRun(), "score", *method).err


@pytest.mark.parametrize("method", [("dve",), ("tracin",)], ids=str)
def test_small_gradients_of_a_measure_are_counted(method, ask):
    # a measure may be 0 where its gradient is not, so its size says nothing
    result = ask(NumericRun(exponent=-35, extra=MEASURE), "score", *method)
    assert "5 of 5 queries have a gradient below 1e-33" in result.err
    assert "queries have" not in ask(NumericRun(exponent=-7, extra=MEASURE), "score", *method).err


VANISHING = """
def loss(model, batch, plain=loss):
    losses = plain(model, batch)
    return torch.where(batch[0][:, 0] > 0, losses * 1e-170, losses)
"""


@pytest.mark.parametrize("command", ["score", "self"])
def test_squares_that_underflow_in_float64_are_counted(command, tmp_path, influence):
    run = build_numeric_run(NumericRun(extra=VANISHING), tmp_path / "run")
    small = sum(bool(item[0][0] > 0) for item in NumericRun().space()["train_data"]())
    assert 0 < small < POOL
    for _ in range(2):  # computed, then cached
        result = influence(command, run, "--precision", "float64", "--lr", "0.1")
        assert result.code == 0, result.err
        assert f"{small} of {POOL} training examples have a loss below 1e-140" in result.err
        assert "is 0 in the selected parameters" not in result.err  # only its square is 0
    plain = build_numeric_run(NumericRun(), tmp_path / "plain")
    assert "below 1e-140" not in influence(command, plain, "--precision", "float64").err


@pytest.mark.parametrize("method", ["dve", "repsim"])
def test_half_precision_is_noted(method, ask):
    result = ask(NumericRun(), "score", method, "--precision", "bfloat16")
    what = "features" if method == "repsim" else "gradients"
    assert result.code == 0, result.err
    assert f"{what} are computed in bfloat16" in result.err


@pytest.mark.parametrize("method", ["tracin", "tracin-we"])
def test_scores_that_underflow_are_refused_although_some_pairs_share_nothing(method, ask):
    # texts of other words have products of 0, which do not underflow
    flags = ("--layers", "0.weight") if method == "tracin" else ()
    run = NumericRun("words", order=tuple(range(6)))
    scores = [float(row["score"]) for row in ask(run, "score", method, "--top", "all", *flags).rows]
    assert 0 < scores.count(0) < len(scores)
    refused(ask(run, "score", method, "--lr", "1e-320", *flags), 1, "all scores underflow")


@pytest.mark.parametrize(("count", "code"), [(1, 0), (2, 1), (3, 1)])
def test_a_single_example_without_features_is_no_sign_of_a_wrong_definition(count, code, ask):
    run = zeros(train=ALL, order=tuple(range(count)), extra=FEATURES)
    assert ask(run, "score", "repsim").code == code
