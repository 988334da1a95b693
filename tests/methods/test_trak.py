"""trak through the real command against the formula on batch-size-one autograd in float64, and
against a Newton step of logistic regression.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_model
from torch import nn

from influence_cli.gradients.forms import Dense
from influence_cli.gradients.joint_projection import JointProjection
from tests import reference
from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

COUNT, QUERIES, NUMBERS = 60, 6, 43  # examples, queries, parameters
CLASSIFIER = replaced(DEFINITION, ("examples(0, 20)", f"examples(0, {COUNT})"))
OUTPUTS = "\ndef outputs(model, batch): return model(batch[0])\n"
MARGIN = """
def measure(model, batch):
    log_p = -loss(model, batch)
    return log_p - torch.log(-torch.expm1(log_p))
"""
LOGISTIC = """
import torch
from torch import nn
from torch.nn import functional as F

def model(): return nn.Linear(4, 1, bias=False)

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator)
    if seed == 0:
        x[:, 0] = x[:, 0].sign()
    return torch.utils.data.TensorDataset(x, torch.randint(0, 2, (number,), generator=generator))

def train_data(): return examples(0, 30)
def query_data(): return examples(1, 5)
def outputs(model, batch): return model(batch[0])[:, 0]
def loss(model, batch):
    return F.binary_cross_entropy_with_logits(
        outputs(model, batch), batch[1].to(batch[0]), reduction="none"
    )
"""
FLAGS = ("--method", "trak", "--precision", "float64")
LOSSLESS = (*FLAGS, "--project", "64")  # more than all parameters: their gradients side by side


def load(run):
    """The definition's functions, and its float64 model at each checkpoint."""
    space: dict = {}
    exec((run / "definition.py").read_text(), space)
    models = []
    for path in sorted((run / "checkpoints").glob("*.safetensors")):
        model = space["model"]()
        load_model(model, path)
        models.append(model.double().eval())
    return space, models


def gradient_rows(space, model, dataset, quantity):
    """(N, p) gradients, (N,) values of `quantity`: one example at a time."""
    singles = [
        [x[None].double() if x.is_floating_point() else x[None] for x in dataset[i]]
        for i in range(len(dataset))
    ]
    with torch.no_grad():
        values = torch.cat([quantity(model, single) for single in singles])
    return reference.flat(reference.gradients(model, quantity, singles)), values


def expected(run, damping=None, project=lambda rows: rows, target=lambda space: space["loss"]):
    """(C, Q, N) scores at each checkpoint. `damping`: None for a tenth of the mean eigenvalue."""
    space, models = load(run)
    scores = []
    for model in models:
        train, losses = gradient_rows(space, model, space["train_data"](), space["loss"])
        query, _ = gradient_rows(space, model, space["query_data"](), target(space))
        train, query = project(train), project(query)
        phi = -train / (1 - torch.exp(-losses))[:, None]
        gram = phi.T @ phi
        ridge = 0.1 * torch.linalg.eigvalsh(gram).mean() if damping is None else damping
        inverse = torch.linalg.inv(gram + ridge * torch.eye(len(gram), dtype=torch.float64))
        scores.append(query @ inverse @ train.T)
    return torch.stack(scores)


def table(result, queries=QUERIES, count=COUNT):
    assert result.code == 0, result.err
    scores = torch.zeros(queries, count, dtype=torch.float64)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] += float(row["score"])
    return scores


def trak(influence, run, *flags):
    return influence("score", run, *LOSSLESS, "--top", "all", *flags)


@pytest.mark.parametrize("damping", [None, 0.01, 5.0])
def test_scores_equal_the_formula(damping, make_run, influence):
    run = make_run(definition=CLASSIFIER)
    flags = [] if damping is None else ["--damping", damping]
    result = table(trak(influence, run, *flags))
    # solving costs the digits of the condition number, below 1e6 here
    assert reference.relative_error(result, expected(run, damping).mean(0)) < 1e-9


def test_a_score_is_a_newton_step_of_logistic_regression(make_run, influence):
    """Where p (1 - p), which TRAK leaves out, is the same at all training examples."""

    def model():
        linear = nn.Linear(4, 1, bias=False)
        nn.init.zeros_(linear.weight)
        nn.init.constant_(linear.weight[:, :1], 0.8)
        return linear

    with torch.no_grad():
        run = make_run(definition=LOGISTIC, steps=(10,), model=model)
    space, (model,) = load(run)
    x = torch.stack([item[0].double() for item in space["train_data"]()])
    probability = torch.sigmoid(model(x)[:, 0])
    curvature = (probability * (1 - probability)).detach()
    assert curvature.max() - curvature.min() < 1e-7  # x is float32
    hessian = torch.einsum("n,ni,nj->ij", curvature, x, x)
    train, _ = gradient_rows(space, model, space["train_data"](), space["loss"])
    query, _ = gradient_rows(space, model, space["query_data"](), space["loss"])
    # without z, the minimum moves by inverse(H) g(z), and the query's loss by the product with it
    newton = query @ torch.linalg.inv(hessian) @ train.T
    result = table(trak(influence, run, "--damping", "0"), 5, 30)
    assert reference.relative_error(result, curvature[0] * newton) < 1e-9


def test_a_proponent_lowers_the_loss_of_the_query(make_run, influence):
    """A step on it, preconditioned by the Gram matrix, does."""
    run = make_run(definition=CLASSIFIER, steps=(10,))
    rows = influence("score", run, *LOSSLESS, "--queries", "0:1", "--top", "1").rows
    kinds = {row["kind"]: int(row["train"]) for row in rows}
    space, (model,) = load(run)
    train, losses = gradient_rows(space, model, space["train_data"](), space["loss"])
    phi = train / -torch.expm1(-losses)[:, None]
    gram = phi.T @ phi
    gram += 0.1 * gram.trace() / len(gram) * torch.eye(len(gram), dtype=torch.float64)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    _, before = gradient_rows(space, model, space["query_data"](), space["loss"])
    for kind, sign in (("proponent", -1), ("opponent", 1)):
        step = torch.linalg.solve(gram, train[kinds[kind]])
        nn.utils.vector_to_parameters(start - 1e-4 * step, model.parameters())
        _, after = gradient_rows(space, model, space["query_data"](), space["loss"])
        assert sign * (after[0] - before[0]) > 0


def test_a_measure_of_the_margin_gives_the_papers_scores(make_run, influence):
    run = make_run(definition=CLASSIFIER + MARGIN)
    scores = expected(run, target=lambda space: lambda *pair: -space["measure"](*pair)).mean(0)
    assert reference.relative_error(table(trak(influence, run)), scores) < 1e-9


def test_the_scores_of_a_loss_are_those_of_the_margin_times_its_doubt(make_run, influence):
    run = make_run(definition=CLASSIFIER, steps=(10,))
    of_loss = table(trak(influence, run))
    space, (model,) = load(run)
    _, losses = gradient_rows(space, model, space["query_data"](), space["loss"])
    (run / "definition.py").write_text(CLASSIFIER + MARGIN)
    of_margin = table(trak(influence, run, "--cache", "none"))
    doubts = -torch.expm1(-losses)[:, None]
    assert reference.relative_error(of_loss, of_margin * doubts) < 1e-9


@pytest.mark.parametrize("flags", [("--project", "8"), ()])
def test_projected_scores_equal_the_formula_of_projected_gradients(flags, make_run, influence):
    run = make_run(definition=CLASSIFIER)
    space, _ = load(run)
    shapes = {name: value.shape for name, value in space["model"]().named_parameters()}
    joint = JointProjection.of(shapes, None, 8, 0)  # a quarter of 60 is 15: 8 is the default

    def project(rows):
        parts = rows.split([shape.numel() for shape in shapes.values()], dim=1)
        pairs = zip(shapes.items(), parts, strict=True)
        return joint.features(
            {name: Dense(tuple(shape), part.contiguous()) for (name, shape), part in pairs}
        )

    result = influence("score", run, *FLAGS, "--top", "all", *flags)
    assert reference.relative_error(table(result), expected(run, project=project).mean(0)) < 1e-9
    if not flags:
        assert "trak projects the gradients of all parameters to 8 numbers" in result.err


@pytest.mark.parametrize("by", ["layer", "checkpoint"])
def test_parts_sum_to_the_score(by, make_run, influence):
    run = make_run(definition=CLASSIFIER)
    alone = table(trak(influence, run))
    by_part = trak(influence, run, "--by", by)
    assert reference.relative_error(table(by_part), alone) < 1e-12
    assert len(by_part.rows) == 2 * COUNT * QUERIES
    if by == "checkpoint":
        first = torch.zeros(QUERIES, COUNT, dtype=torch.float64)
        for row in by_part.rows:
            if row["checkpoint"] == "10":
                first[int(row["query"]), int(row["train"])] = float(row["score"])
        assert reference.relative_error(2 * first, expected(run)[0]) < 1e-9


def test_scores_do_not_depend_on_batches_or_the_cache(make_run, influence):
    run = make_run(definition=CLASSIFIER)
    scores = [
        table(trak(influence, run, "--cache", cache, "--batch-size", size))
        for cache, size in (("one", "1"), ("seven", "7"), ("none", "9"), ("none", "auto"))
    ]
    assert all(reference.relative_error(other, scores[0]) < 1e-10 for other in scores[1:])


def test_the_gram_matrix_is_that_of_all_training_examples(make_run, influence):
    run = make_run(definition=CLASSIFIER)
    every = {(row["query"], row["train"]): row["score"] for row in trak(influence, run).rows}
    some = trak(influence, run, "--train", "3,17,40:44", "--queries", "2,4").rows
    assert len(some) == 12
    for row in some:
        score = float(every[row["query"], row["train"]])
        assert abs(float(row["score"]) - score) < 1e-10 * abs(score)


def test_shards_have_the_scores_of_one_process(make_run, influence):
    run = make_run(definition=replaced(CLASSIFIER, (f"examples(0, {COUNT})", "examples(0, 150)")))
    alone = table(trak(influence, run), count=150)
    shards = [trak(influence, run, "--shard", f"{number}/2") for number in (1, 2)]
    assert all(shard.rows for shard in shards)
    together = sum(table(shard, count=150) for shard in shards)
    assert reference.relative_error(together, alone) < 1e-12  # BLAS sums other blocks


def test_sum_queries_gives_the_mean(make_run, influence):
    run = make_run(definition=CLASSIFIER)
    for flags in (LOSSLESS, FLAGS):  # projected in the cache, and exact there
        single = table(influence("score", run, *flags, "--top", "all"))
        result = influence("score", run, *flags, "--top", "all", "--sum-queries")
        together = torch.zeros(COUNT, dtype=torch.float64)
        for row in result.rows:
            together[int(row["train"])] = float(row["score"])
        assert reference.relative_error(together, single.mean(0)) < 1e-9


def test_layers_select_parameters(make_run, influence):
    run = make_run(definition=CLASSIFIER)
    scores = expected(run, project=lambda rows: rows[:, 25:]).mean(0)  # of the second Linear
    assert reference.relative_error(table(trak(influence, run, "--layers", "2")), scores) < 1e-9


def test_the_ridge_and_what_is_assumed_are_noted(make_run, influence):
    run = make_run(definition=CLASSIFIER, steps=(10,))
    result = trak(influence, run)
    space, (model,) = load(run)
    train, losses = gradient_rows(space, model, space["train_data"](), space["loss"])
    phi = train / -torch.expm1(-losses)[:, None]
    ridge = 0.1 * float((phi * phi).sum()) / NUMBERS
    assert f"note: --damping auto: {ridge:.3g}, 0.1 times the mean eigenvalue" in result.err
    assert "trak assumes that loss() is the cross-entropy of one label" in result.err
    (run / "definition.py").write_text(CLASSIFIER + OUTPUTS)
    checked = trak(influence, run)
    assert "assumes" not in checked.err
    assert checked.out == result.out
    assert "--damping auto" not in trak(influence, run, "--damping", "1").err


def test_examples_without_doubt_are_clipped_in_the_gram_matrix_alone(make_run, influence):
    """float32: exp(-loss) of some examples rounds to 1."""

    def model():
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        with torch.no_grad():
            net[2].weight *= 40
        return net

    run = make_run(definition=CLASSIFIER, steps=(10,), model=model)
    result = influence("score", run, "--method", "trak", "--project", "64", "--top", "all")
    space, (model,) = load(run)
    train, _ = gradient_rows(space, model, space["train_data"](), space["loss"])
    query, _ = gradient_rows(space, model, space["query_data"](), space["loss"])
    least = 16 * np.finfo(np.float32).eps
    doubts, own = torch.zeros(COUNT, dtype=torch.float64), influence("self", run, "--top", "all")
    for row in own.rows:  # losses as float32 gives them
        doubts[int(row["train"])] = -np.expm1(-float(row["loss"]))
    clipped = int((doubts < least).sum())
    assert 0 < clipped < COUNT
    assert f"note: {clipped} of 60 training examples have 1 - p below 1.9e-06" in result.err
    phi = train / doubts.clamp_min(least)[:, None]
    gram = phi.T @ phi
    gram += 0.1 * gram.trace() / NUMBERS * torch.eye(NUMBERS, dtype=torch.float64)
    scores = query @ torch.linalg.inv(gram) @ train.T
    # losses of float32 near 1e-6 have one digit
    assert reference.relative_error(table(result), scores) < 0.05


def test_more_numbers_than_examples_are_refused(make_run, influence):
    result = influence("score", make_run(), "--method", "trak", "--project", "24")
    refused(result, 2, "--project 24: trak needs as many training examples",
            "found: 20 training examples, 24 numbers", "--project 4, or leave it out")  # fmt: skip


def test_a_singular_gram_matrix_is_refused(make_run, influence):
    """The gradients of a softmax's bias sum to 0."""
    run = make_run(definition=CLASSIFIER)
    result = influence("score", run, *LOSSLESS, "--damping", "0")
    refused(result, 1, "the Gram matrix at checkpoints/step-000010.safetensors is singular",
            "--damping auto, or a smaller --project K")  # fmt: skip


@pytest.mark.parametrize("value", ["-1", "much", "inf", "nan"])
def test_other_ridges_are_refused(value, make_run, influence):
    result = influence("score", make_run(), "--method", "trak", "--damping", value)
    refused(result, 2, f"--damping {value}", "expected: a number from 0, or auto")


LOSSES = {
    "label smoothing": (
        ('reduction="none")', 'reduction="none", label_smoothing=0.1)'),
        "no label has a probability of exp(-loss)",
    ),
    "a squared loss": (
        ('F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
         "(model(batch[0]) ** 2).sum(1)"),
        "no label has a probability of exp(-loss)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_are_refused_by_the_probabilities_of_outputs(name, make_run, influence):
    change, says = LOSSES[name]
    run = make_run(definition=replaced(CLASSIFIER, change) + OUTPUTS)
    result = influence("score", run, *LOSSLESS)
    refused(result, 1, "trak: loss() in definition.py is not the cross-entropy of one label", says,
            "found: example", "--method tracin takes any loss")  # fmt: skip


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("model(batch[0])[:, None]", "outputs() returned (16, 1, 3) for 16 examples"),
        ("{'logits': model(batch[0])}", "for 16 examples"),
        ("1 / 0", "outputs() in definition.py raised ZeroDivisionError"),
    ],
)
def test_other_outputs_are_refused(body, says, make_run, influence):
    run = make_run(definition=f"{CLASSIFIER}\ndef outputs(model, batch): return {body}\n")
    refused(influence("score", run, *LOSSLESS), 1, says)


def test_a_loss_below_zero_is_refused_without_outputs(make_run, influence):
    run = make_run(definition=replaced(CLASSIFIER, ('reduction="none")', 'reduction="none") - 9')))
    refused(influence("score", run, *LOSSLESS), 1, "not the cross-entropy of one label",
            "found: example 0 of train_data() has the loss -", "is at least 0")  # fmt: skip


@pytest.mark.parametrize("flags", [["--normalize"], ["--lr", "1"], ["--lr-weights", "none"]])
def test_flags_that_trak_has_not_are_refused(flags, make_run, influence):
    result = influence("score", make_run(), "--method", "trak", *flags)
    refused(result, 2, f"{flags[0]} does not apply to --method trak")


def test_candidates_are_refused(make_run, influence, tmp_path):
    (tmp_path / "rows.csv").write_text("x\n1\n")
    result = influence(
        "score", make_run(), "--method", "trak", "--candidates", tmp_path / "rows.csv"
    )
    refused(result, 2, "--candidates does not apply to --method trak", "train_data()")
