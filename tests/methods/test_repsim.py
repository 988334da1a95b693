"""The baseline RepSim against cosines of features that are computed one example at a time."""

import pytest
import torch
from safetensors.torch import load_model

from tests.conftest import DEFINITION
from tests.methods.test_tracin import table
from tests.refusals import refused, replaced

FEATURES = "\ndef features(model, batch): return model[0](batch[0])\n"


def expected(run, own_features=False):
    """(Q, N) cosines in float64, from single examples."""
    space: dict = {}
    exec((run / "definition.py").read_text(), space)
    model = space["model"]()
    load_model(model, sorted((run / "checkpoints").glob("*.safetensors"))[-1])
    model = model.double()
    body = model[0] if own_features else model[:2]  # the last Linear reads what comes after tanh

    def rows(dataset):
        with torch.no_grad():
            return torch.stack([body(dataset[i][0].double()[None])[0] for i in range(len(dataset))])

    query, train = rows(space["query_data"]()), rows(space["train_data"]())
    return torch.nn.functional.cosine_similarity(query[:, None], train[None], dim=2)


@pytest.mark.parametrize("own_features", [False, True])
@pytest.mark.parametrize("batch_size", ["1", "7", "auto"])
def test_scores_are_cosines_of_features(own_features, batch_size, make_run, influence):
    run = make_run(definition=DEFINITION + (FEATURES if own_features else ""))
    result = influence(
        "score", run, "--method", "repsim", "--top", "all", "--batch-size", batch_size,
        "--precision", "float64",
    )  # fmt: skip
    error = (table(result, 6, 20) - expected(run, own_features)).abs().max()
    assert error < 1e-12  # float64 sums of five products


def test_sum_queries_gives_the_mean_of_the_cosines(make_run, influence):
    run = make_run()
    result = influence(
        "score",
        run,
        "--method",
        "repsim",
        "--top",
        "all",
        "--sum-queries",
        "--precision",
        "float64",
    )
    scores = {int(row["train"]): float(row["score"]) for row in result.rows}
    for example, score in enumerate(expected(run).mean(0).tolist()):
        assert abs(scores[example] - score) < 1e-12


def test_positions_are_averaged(make_run, influence):
    text = replaced(
        DEFINITION,
        ("model(batch[0])", "model(batch[0].reshape(-1, 2, 2)).mean(1)"),
        ("nn.Linear(4, 5)", "nn.Linear(2, 5)"),
    )
    run = make_run(definition=text + "\ndef features(model, batch):\n"
                   "    return model[:2](batch[0].reshape(-1, 2, 2)).mean(1)\n")  # fmt: skip
    own = influence("score", run, "--method", "repsim", "--top", "all")
    (run / "definition.py").write_text(text)
    assert influence("score", run, "--method", "repsim", "--top", "all").out == own.out


def test_a_model_without_a_linear_layer_is_refused(make_run, influence):
    text = replaced(
        DEFINITION,
        ("nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))", "nn.Conv1d(1, 3, 4)"),
        ("model(batch[0])", "model(batch[0][:, None]).squeeze(2)"),
    )
    result = influence("score", make_run(definition=text), "--method", "repsim")
    refused(result, 1, "lacks features()", "no nn.Linear", "features(model, batch) returns")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("model(batch[0]).sum(1)", "returned (20,) for 20 examples"),
        ("None", "returned <class 'NoneType'> for 20 examples"),
        ("1 / 0", "features() in definition.py raised ZeroDivisionError"),
    ],
)
def test_bad_features_are_refused(body, says, make_run, influence):
    text = f"{DEFINITION}\ndef features(model, batch): return {body}\n"
    result = influence("score", make_run(definition=text), "--method", "repsim", "--queries", "0:1")
    assert result.code == 1
    assert says.replace("20", "1") in result.err or says in result.err


@pytest.mark.parametrize("flag", [("--by", "layer"), ("--lr", "1"), ("--project", "4")])
def test_flags_that_repsim_has_not_are_refused(flag, make_run, influence):
    refused(influence("score", make_run(), "--method", "repsim", *flag), 2, flag[0])
