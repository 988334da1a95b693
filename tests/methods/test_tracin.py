"""TracIn through the real command against the formula on batch-size-one autograd in float64."""

import json

import pytest
import torch
from safetensors.torch import load_model, save_file

from influence_cli.gradients.batches import to
from tests import reference
from tests.cases import CASES
from tests.conftest import DEFINITION

OF_CASE = """
from tests.cases import CASES
case = CASES[{name!r}]
def model(): return case.model()
def train_data(): return case.examples()
def query_data(): return case.examples()[:3]
def loss(model, batch): return case.loss(model, batch)
def collate(items): return case.collate(items)
"""


def expected(run, case, globs=None, rates=(0.1, 0.05), normalize=False):
    """(Q, N) scores of a run of a case, in float64."""
    grads, items = [], case.examples()
    for path in sorted((run / "checkpoints").glob("*.safetensors")):
        model = case.model()
        load_model(model, path)
        singles = [to(case.collate([item]), torch.device("cpu"), torch.float64) for item in items]
        grads.append(reference.flat(reference.gradients(model.double(), case.loss, singles), globs))
    return reference.tracin(grads, [g[:3] for g in grads], rates[: len(grads)], normalize)


def table(result, queries, train):
    assert result.code == 0, result.err
    scores = torch.zeros(queries, train, dtype=torch.float64)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] += float(row["score"])
    return scores


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_the_formula_in_float64(name, make_run, influence):
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    result = influence("score", run, "--top", "all", "--precision", "float64")
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "tied", "encoder", "batchnorm-eval", "padded-texts"])
@pytest.mark.parametrize(
    ("store", "limit"),
    [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2), ("float64", 1e-5)],
)
def test_scores_in_float32_are_right_to_the_precision_they_are_stored_in(
    name, store, limit, make_run, influence
):
    run = make_run(definition=OF_CASE.format(name=name), model=CASES[name].model)
    result = influence("score", run, "--top", "all", "--precision", "float32", "--store", store)
    assert reference.relative_error(table(result, 3, 5), expected(run, CASES[name])) < limit


def test_small_gradients_survive_float16(make_run, influence):
    definition = DEFINITION.replace('reduction="none")', 'reduction="none") * 1e-12')
    run = make_run(definition=definition)
    exact, half = (
        influence("score", run, "--top", "all", "--store", store)
        for store in ("float32", "float16")
    )
    scores = table(exact, 6, 20)
    assert scores.abs().max() < 1e-20
    assert reference.relative_error(table(half, 6, 20), scores) < 2e-3


@pytest.mark.parametrize("by", ["checkpoint", "layer"])
def test_parts_sum_to_the_score(by, make_run, influence):
    run = make_run()
    whole, parts = (influence("score", run, "--top", "all", *flags) for flags in ([], ["--by", by]))
    assert (
        parts.out.splitlines()[0]
        == f"query,kind,rank,train,{by},score,query_label,train_label,query_text,train_text"
    )
    torch.testing.assert_close(table(parts, 6, 20), table(whole, 6, 20), rtol=1e-12, atol=1e-15)
    assert [(r["query"], r["kind"], r["rank"], r["train"]) for r in parts.rows[::2]] == [
        (r["query"], r["kind"], r["rank"], r["train"]) for r in whole.rows
    ]
    assert list(dict.fromkeys(row[by] for row in parts.rows)) == (
        ["10", "20"] if by == "checkpoint" else ["0", "2"]
    )


def test_layers_and_steps_are_the_parts_they_name(make_run, influence):
    run = make_run()
    by_layer = influence("score", run, "--top", "all", "--by", "layer")
    by_step = influence("score", run, "--top", "all", "--by", "checkpoint")
    for result, column, part, flags in [
        (by_layer, "layer", "2", ["--layers", "2"]),
        (by_step, "checkpoint", "20", ["--steps", "20"]),
    ]:
        alone = table(influence("score", run, "--top", "all", *flags), 6, 20)
        scores = torch.zeros(6, 20, dtype=torch.float64)
        for row in result.rows:
            if row[column] == part:
                scores[int(row["query"]), int(row["train"])] = float(row["score"])
        torch.testing.assert_close(alone, scores, rtol=1e-12, atol=1e-15)


def test_grad_dot_and_grad_cos_read_the_last_checkpoint_without_a_rate(make_run, influence):
    run = make_run(definition=OF_CASE.format(name="mlp"), model=CASES["mlp"].model)
    last = expected(run, CASES["mlp"], rates=(0.0, 1.0))
    result = table(
        influence("score", run, "--method", "grad-dot", "--top", "all", "--precision", "float64"),
        3,
        5,
    )
    assert reference.relative_error(result, last) < 1e-9
    cosine = expected(run, CASES["mlp"], rates=(0.0, 1.0), normalize=True)
    result = table(
        influence("score", run, "--method", "grad-cos", "--top", "all", "--precision", "float64"),
        3,
        5,
    )
    assert reference.relative_error(result, cosine) < 1e-9
    assert result.diagonal()[:3].sub(1).abs().max() < 1e-9


def test_normalize_takes_the_cosine_at_each_checkpoint(make_run, influence):
    run = make_run(definition=OF_CASE.format(name="mlp"), model=CASES["mlp"].model)
    result = influence(
        "score", run, "--top", "all", "--precision", "float64", "--normalize", "--layers", "2"
    )
    wanted = expected(run, CASES["mlp"], ["2.weight", "2.bias"], normalize=True)
    assert reference.relative_error(table(result, 3, 5), wanted) < 1e-9


def test_sum_queries_is_the_mean_of_the_queries(make_run, influence):
    run = make_run()
    single = table(influence("score", run, "--top", "all", "--precision", "float64"), 6, 20)
    result = influence("score", run, "--top", "all", "--precision", "float64", "--sum-queries")
    assert {row["query"] for row in result.rows} == {"all"}
    together = torch.zeros(20, dtype=torch.float64)
    for row in result.rows:
        together[int(row["train"])] = float(row["score"])
    torch.testing.assert_close(together, single.mean(0), rtol=1e-9, atol=1e-14)


def test_groups_sum_the_scores_of_their_members(make_run, influence, tmp_path):
    run = make_run()
    labelled = influence("score", run, "--top", "all", "--precision", "float64")
    sums: dict = {}
    for row in labelled.rows:
        key = (row["query"], row["train_label"])
        sums[key] = sums.get(key, 0) + float(row["score"])
    (tmp_path / "names.txt").write_text(
        "".join(f"{'abc'[int(label)]}\n" for label in torch.randint(0, 3, (20,)))
    )
    result = influence("score", run, "--precision", "float64", "--group-by", "label")
    assert result.code == 0, result.err
    assert {
        (row["query"], row["train"]): float(row["score"]) for row in result.rows
    } == pytest.approx(sums, rel=1e-9)
    by_file = influence("score", run, "--group-by", tmp_path / "names.txt", "--by", "checkpoint")
    assert by_file.code == 0, by_file.err
    assert {row["train"] for row in by_file.rows} <= set("abc")


def test_measure_is_larger_is_better(make_run, influence):
    run = make_run()
    by_loss = influence("score", run, "--top", "all", "--precision", "float64")
    (run / "definition.py").write_text(
        DEFINITION + "\ndef measure(model, batch):\n    return -loss(model, batch)\n"
    )
    by_measure = influence("score", run, "--top", "all", "--precision", "float64")
    assert by_measure.out == by_loss.out


def test_self_influence_is_the_weighted_squared_norm(make_run, influence):
    run = make_run(definition=OF_CASE.format(name="tied"), model=CASES["tied"].model)
    result = influence("self", run, "--top", "all", "--precision", "float64")
    case = CASES["tied"]
    total = torch.zeros(5, dtype=torch.float64)
    for path, rate in zip(
        sorted((run / "checkpoints").glob("*.safetensors")), (0.1, 0.05), strict=True
    ):
        model = case.model()
        load_model(model, path)
        grads = reference.flat(
            reference.gradients(
                model.double(), case.loss, [case.collate([item]) for item in case.examples()]
            )
        )
        total += rate * grads.square().sum(1)
    assert [int(row["train"]) for row in result.rows] == total.argsort(descending=True).tolist()
    assert [float(row["score"]) for row in result.rows] == pytest.approx(
        total.sort(descending=True).values.tolist(), rel=1e-9
    )
    by_norms = sum(path.stat().st_size for path in (run / ".influence").rglob("*.safetensors"))
    influence("score", run, "--precision", "float64")
    assert by_norms < 0.7 * sum(
        path.stat().st_size for path in (run / ".influence").rglob("*.safetensors")
    ), "self keeps norms only"


def test_queries_in_several_passes_score_the_same(make_run, influence, monkeypatch):
    from influence_cli.methods import query_passes

    run = make_run()
    once = influence("score", run, "--precision", "float64", "--top", "4")
    monkeypatch.setattr(query_passes, "QUERY_BYTES", 1200)
    passes = influence("score", run, "--precision", "float64", "--top", "4")
    assert "passes, and with --cache none" not in passes.err
    live = influence("score", run, "--precision", "float64", "--top", "4", "--cache", "none")
    assert "the 6 queries take 6 passes: their gradients (4.1 KB) go to" in live.err
    assert [(r["query"], r["train"]) for r in live.rows] == [
        (r["query"], r["train"]) for r in once.rows
    ]
    assert [(r["query"], r["train"]) for r in passes.rows] == [
        (r["query"], r["train"]) for r in once.rows
    ]
    assert [float(r["score"]) for r in passes.rows] == pytest.approx(
        [float(r["score"]) for r in once.rows], rel=1e-12
    )


def test_rates_per_parameter_group_weigh_their_parameters(make_run, influence):
    run = make_run(steps=(1, 2))
    lines = [
        {
            "format": "influence-trajectory",
            "version": 1,
            "groups": [{"params": ["0.weight", "0.bias"]}, {"params": ["2.weight", "2.bias"]}],
        },
        {"step": 0, "lr": [0.5, 0.25], "examples": [1]},
        {"step": 1, "lr": [2.0, 4.0], "examples": [2]},
    ]
    (run / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rated = table(influence("score", run, "--top", "all", "--precision", "float64"), 6, 20)
    first, second = (
        table(
            influence(
                "score",
                run,
                "--top",
                "all",
                "--precision",
                "float64",
                "--lr",
                lr,
                "--layers",
                layer,
            ),
            6,
            20,
        )
        for lr, layer in (("2", "0"), ("4", "2"))
    )
    torch.testing.assert_close(rated, first + second, rtol=1e-9, atol=1e-14)


def test_tracin_ideal_telescopes_at_batch_size_one(make_run, influence):
    """With every step of batch size 1 saved, the scores of the example trained on at each step sum to the fall of the query's loss,
    up to the second order in the step size: halving the step size halves the relative error."""
    errors = []
    for rate in (0.02, 0.01):
        run = make_run(f"rate-{rate}", steps=())
        space: dict = {"__file__": "definition.py"}
        exec(DEFINITION, space)
        torch.manual_seed(0)
        model, data, queries = (
            space["model"]().double(),
            space["train_data"](),
            space["query_data"](),
        )
        order = [step % 20 for step in range(40)]

        def losses(model=model, space=space, queries=queries):
            return space["loss"](model, (queries.tensors[0].double(), queries.tensors[1])).detach()

        before = losses()
        for step, index in enumerate(order):
            save_file(
                model.state_dict(),
                run / f"checkpoints/step-{step:06d}.safetensors",
                metadata={"learning_rate": str(rate)},
            )
            value = space["loss"](
                model,
                (data.tensors[0][index : index + 1].double(), data.tensors[1][index : index + 1]),
            ).sum()
            with torch.no_grad():
                for parameter, gradient in zip(
                    model.parameters(),
                    torch.autograd.grad(value, list(model.parameters())),
                    strict=True,
                ):
                    parameter -= rate * gradient
        fall = before - losses()
        result = influence(
            "score", run, "--top", "all", "--by", "checkpoint", "--precision", "float64"
        )
        assert result.code == 0, result.err
        total = torch.zeros(6, dtype=torch.float64)
        for row in result.rows:
            if order[int(row["checkpoint"])] == int(row["train"]):
                total[int(row["query"])] += float(row["score"])
        errors.append(float((total - fall).norm() / fall.norm()))
    assert errors[0] < 0.1
    assert errors[1] == pytest.approx(errors[0] / 2, rel=0.15)


def test_a_zero_gradient_has_cosine_zero(make_run, influence):
    definition = DEFINITION.replace(
        "return F.cross_entropy", "return (batch[1] != 0) * F.cross_entropy"
    )
    run = make_run(definition=definition)
    result = influence("score", run, "--method", "grad-cos", "--top", "all")
    assert all(float(row["score"]) == 0 for row in result.rows if row["train_label"] == "a")
