"""`--normalize` and `self` in the metric of the inverse curvature, against dense inverses of one example at a time."""

import numpy as np
import pytest
import torch

from influence_cli.gradients.forms import Dense, Factors
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.preconditioners.kinds import KINDS
from tests.methods.test_influence import FLAGS, gradients, scores
from tests.preconditioners.test_maps import FORMS, fit
from tests.refusals import refused

SELF = ("--method", "influence", "--precision", "float64", "--top", "all")
DAMPING = 0.05


def dense_maps(train):
    """Of `--curvature fisher`: name -> (F + damping)^{-1} by numpy."""
    maps = {}
    for name, grads in train.items():
        flat = grads.flatten(1).numpy()
        fisher = sum(np.outer(row, row) for row in flat) / len(flat)
        maps[name] = np.linalg.inv(fisher + DAMPING * np.eye(len(fisher)))
    return maps


def product(maps, first, second):
    """g^T M h over all parameters; first, second: name -> gradient of one example."""
    return sum(
        float(first[name].flatten().numpy() @ maps[name] @ second[name].flatten().numpy())
        for name in maps
    )


def one(grads, index):
    return {name: values[index] for name, values in grads.items()}


def reference(run):
    """(6, 20) cosines, and (20,) products of each training example with itself."""
    train, query = gradients(run)
    maps = dense_maps(train)
    own = [product(maps, one(train, i), one(train, i)) for i in range(20)]
    cosines = torch.zeros(6, 20, dtype=torch.float64)
    for q in range(6):
        norm = product(maps, one(query, q), one(query, q))
        for i in range(20):
            cosines[q, i] = product(maps, one(query, q), one(train, i)) / (norm * own[i]) ** 0.5
    return cosines, own


@pytest.mark.parametrize("flags", [(), ("--by", "layer"), ("--cache", "none", "--batch-size", "7")])
def test_normalized_scores_are_cosines_in_the_metric(flags, make_run, influence):
    run = make_run()
    result = influence("score", run, *FLAGS, *flags, "--curvature", "fisher", "--damping", DAMPING, "--normalize")  # fmt: skip
    assert torch.allclose(scores(result), reference(run)[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("flags", [(), ("--cache", "none", "--batch-size", "7")])
def test_self_is_the_score_of_an_example_on_itself(flags, make_run, influence):
    run = make_run()
    result = influence("self", run, *SELF, *flags, "--curvature", "fisher", "--damping", DAMPING)
    assert result.code == 0, result.err
    own = reference(run)[1]
    assert {int(row["train"]): float(row["score"]) for row in result.rows} == pytest.approx(
        dict(enumerate(own)), rel=1e-8
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_that_is_also_the_query_has_the_cosine_1_and_its_self_influence(
    kind, make_run, influence
):
    from tests.conftest import DEFINITION

    run = make_run("run", DEFINITION.replace("examples(1, 6)", "examples(0, 20)"))
    flags = (*FLAGS, "--curvature", kind)
    own = influence("self", run, *SELF, "--curvature", kind)
    table = scores(influence("score", run, *flags), queries=20).diagonal()
    by_id = {int(row["train"]): float(row["score"]) for row in own.rows}
    assert by_id == pytest.approx(dict(enumerate(table.tolist())), rel=1e-9)
    cosines = scores(influence("score", run, *flags, "--normalize"), queries=20)
    assert cosines.diagonal().tolist() == pytest.approx([1.0] * 20, rel=1e-9)
    assert cosines.abs().max() < 1 + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMS)
def test_norms_of_every_form_are_products_with_the_solution(name, kind):
    form = FORMS[name]
    block, dense = fit(form, kind), form.dense().values
    expected = (dense * block.solve(dense, DAMPING)).sum(1)
    computed = block.sqnorms(form, DAMPING)
    assert torch.allclose(computed, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["factors", "embedding"])
def test_norms_of_factors_and_rows_form_no_dense_gradient(name, monkeypatch):
    form = FORMS[name]
    block = fit(form, "ekfac")
    for kind in (Dense, Factors, EmbeddingRows):
        monkeypatch.setattr(kind, "parts", lambda self: pytest.fail("a dense gradient"))
    assert len(block.sqnorms(form, DAMPING)) == len(form)


def test_self_aggregates_layers_in_the_metric(make_run, influence):
    run = make_run()
    flags = (*SELF, "--curvature", "fisher", "--damping", DAMPING)
    result = influence("self", run, *flags, "--aggregate", "rank")
    train, _ = gradients(run)
    maps = dense_maps(train)
    points = np.zeros(20)
    for layer in ("0", "2"):
        some = {name: value for name, value in maps.items() if name.startswith(layer)}
        own = [product(some, one(train, i), one(train, i)) for i in range(20)]
        points += (np.argsort(np.argsort(own)) + 1) / 20 - 0.5
    assert {int(row["train"]): float(row["score"]) for row in result.rows} == pytest.approx(
        dict(enumerate(points / 2)), abs=1e-12
    )


def test_mislabel_ranks_by_self_influence_in_the_metric(tmp_path, make_run, influence):
    run = make_run()
    (tmp_path / "wrong.txt").write_text("3\n7\n")
    flags = ("--wrong", tmp_path / "wrong.txt", "--method", "influence", "--precision", "float64")
    result = influence("evaluate", run, "mislabel", *flags, "--curvature", "fisher", "--damping", DAMPING)  # fmt: skip
    assert result.code == 0, result.err
    own = reference(run)[1]
    right = [own[i] for i in range(20) if i not in (3, 7)]
    area = np.mean([own[wrong] > score for wrong in (3, 7) for score in right])
    values = {(row["method"], row["figure"]): float(row["value"]) for row in result.rows}
    assert values["influence", "auc"] == pytest.approx(area)


def test_self_refuses_methods_and_flags_that_do_not_apply(make_run, influence):
    run = make_run()
    refused(influence("self", run, "--method", "trak"), 2, "--method trak", "tracin, grad-dot")
    refused(
        influence("self", run, "--curvature", "fisher"),
        2,
        "--curvature does not apply to --method tracin",
    )
    refused(
        influence("self", run, *SELF, "--lr", "0.1"),
        2,
        "--lr does not apply to --method influence",
    )
    refused(
        influence("self", run, *SELF, "--candidates", run / "rows.csv"),
        2,
        "--candidates does not apply to --method influence",
    )
