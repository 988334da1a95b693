"""--fisher true: curvature of labels that are drawn from the model, against enumeration of all labels."""

import pytest
import torch
from torch.func import functional_call, jacrev

from influence_cli.preconditioners import passes
from tests.conftest import DEFINITION
from tests.methods.test_influence import FLAGS, blocks, gradients, load, scores, solve
from tests.refusals import refused

OUTPUTS = "\ndef outputs(model, batch):\n    return model(batch[0])\n"
COPIES = 150
MANY = DEFINITION.replace(
    "return examples(0, 20)",
    f"x, y = examples(0, 20).tensors\n    return torch.utils.data.TensorDataset(x.repeat({COPIES}, 1), y.repeat({COPIES}))",
)
SQUARED = MANY.replace(f"y.repeat({COPIES})", f"y.repeat({COPIES}, 1)").replace(
    "torch.randint(0, 3, (number,), generator=generator)",
    "torch.randn(number, 3, generator=generator)",
)
SQUARED = SQUARED.replace(
    'F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
    "C * (model(batch[0]) - batch[1]).square().sum(1)",
).replace('return "abc"[int(example[1])]', 'return "none"')
BINARY = MANY.replace("nn.Linear(5, 3)", "nn.Linear(5, 1)").replace("randint(0, 3,", "randint(0, 2,").replace(
    'F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
    'F.binary_cross_entropy_with_logits(model(batch[0])[:, 0], batch[1].to(batch[0].dtype), reduction="none")',
)  # fmt: skip
TRUE = ("--fisher", "true", "--damping", "0.05")


def with_outputs(definition):
    return definition + OUTPUTS


def bound_model(run):
    from safetensors.torch import load_model

    space = load(run)
    model = space["model"]()
    load_model(model, str(run / "checkpoints/step-000020.safetensors"))
    model = model.double()
    return space, model, {name: value.detach() for name, value in model.named_parameters()}


def jacobians(run):
    """Outputs (M,) and their Jacobian (M, p) of each of the 20 examples, one at a time."""
    space, model, parameters = bound_model(run)
    for x in space["train_data"]().tensors[0][:20].double():

        def outputs(values, x=x):
            return functional_call(model, values, (x[None],))[0]

        parts = jacrev(outputs)(parameters)
        jacobian = {name: part.flatten(1) for name, part in parts.items()}
        yield outputs(parameters).detach(), jacobian


def fitted(run, name):
    """The sums of one bias, or of a weight with --curvature fisher, divided by the examples."""
    import hashlib

    place = hashlib.sha256(name.encode()).hexdigest()[:16]
    from safetensors.torch import load_file

    (path,) = (run / ".influence/preconditioners").rglob(f"moments-{place}.safetensors")
    tensors = load_file(path)
    return tensors["left"] / tensors["counts"][0]


def expected_and_error(run, likelihood):
    """Of each parameter E[g g^T] over labels, and the standard error of its mean over all draws, as
    a Frobenius norm. `likelihood(outputs)`: labels' probabilities and gradients at the outputs."""
    means, variances = {}, {}
    for outputs, jacobian in jacobians(run):
        for weight, grad in likelihood(outputs):
            for name, part in jacobian.items():
                g = grad @ part
                outer = torch.outer(g, g)
                means[name] = means.get(name, 0) + weight * outer / 20
                variances[name] = variances.get(name, 0) + weight * outer.square().sum() / 20
    errors = {
        name: ((variances[name]) / (20 * COPIES)) ** 0.5 for name in means
    }  # Var <= E |g g^T|^2
    return means, errors


def classes(outputs):
    p = outputs.softmax(0)
    return [(float(p[c]), p - torch.eye(len(p), dtype=p.dtype)[c]) for c in range(len(p))]


def two_classes(outputs):
    p = torch.sigmoid(outputs)
    return [(float(p), p - 1), (float(1 - p), p)]


def agrees_with_enumeration(run, likelihood):
    """Within 4 standard errors: by chance in less than 1 of 16 seeds, and this one is fixed."""
    means, errors = expected_and_error(run, likelihood)
    assert sum(mean.shape[0] for mean in means.values()) < 500
    for name, mean in means.items():
        distance = (fitted(run, name) - mean).norm()
        assert distance < 4 * errors[name], name
        assert distance > 0  # it is drawn
        assert 4 * errors[name] < 0.5 * mean.norm(), "the bound says little"


@pytest.mark.parametrize("name", ["classes", "two classes"])
def test_draws_of_a_cross_entropy_average_to_all_labels_by_their_probability(name, make_run, influence):  # fmt: skip
    definition, likelihood = {"classes": (MANY, classes), "two classes": (BINARY, two_classes)}[name]  # fmt: skip
    run = make_run("run", with_outputs(definition))
    result = influence("score", run, *FLAGS, "--train", "0:20", "--curvature", "fisher", *TRUE)
    assert result.code == 0, result.err
    assert "3,000 labels, one per training example" in result.err and "--seed 0" in result.err
    agrees_with_enumeration(run, likelihood)


@pytest.mark.parametrize("scale", ["0.5", "1 / 3", "2.0"])
def test_draws_of_a_squared_loss_have_its_variance(scale, make_run, influence):
    """E[g g^T] = J^T (4 c^2 / (2 c)) J = 2 c J^T J. The fourth moments of normal numbers bound the error."""
    run = make_run("run", with_outputs(SQUARED.replace("C *", f"({scale}) *")))
    result = influence("score", run, *FLAGS, "--train", "0:20", "--curvature", "fisher", *TRUE)
    assert result.code == 0, result.err
    c = eval(scale)
    assert f"variance {0.5 / c:.3g}" in result.err
    means, squares = {}, {}
    for _, jacobian in jacobians(run):
        for name, part in jacobian.items():
            gram = 2 * c * part.T @ part
            means[name] = means.get(name, 0) + gram / 20
            fourth = gram.trace() ** 2 + 2 * gram.square().sum()  # E |g|^4 of a normal g
            squares[name] = squares.get(name, 0) + float(fourth) / 20
    for name, mean in means.items():
        error = (squares[name] / (20 * COPIES)) ** 0.5
        assert 0 < (fitted(run, name) - mean).norm() < 4 * error
        assert 4 * error < 0.5 * mean.norm()


SAMPLED = with_outputs(DEFINITION) + (
    "\ndef sample(outputs, batch, generator):\n"
    "    assert outputs.shape == (1, 3) and generator.device.type == 'cpu'\n"
    "    return batch[0], (outputs.argmin(1) + batch[1]) % 3\n"
)


@pytest.mark.parametrize("flags", [(), ("--batch-size", "1"), ("--cache", "none", "--batch-size", "7")])  # fmt: skip
@pytest.mark.parametrize("kind", ["fisher", "shampoo"])
def test_a_sample_without_chance_gives_the_curvature_of_its_labels(kind, flags, make_run, influence):  # fmt: skip
    run = make_run("run", SAMPLED)
    space, model, _ = bound_model(run)
    x, y = space["train_data"]().tensors
    labels = (model(x.double()).argmin(1) + y) % 3
    assert (labels != y).any()
    train, query = gradients(run)
    forced = DEFINITION.replace("return examples(0, 20)", f"return torch.utils.data.TensorDataset(examples(0, 20).tensors[0], torch.tensor({labels.tolist()}))")  # fmt: skip
    drawn, _ = gradients(make_run("forced", forced))
    train, query, drawn = (blocks(kind, grads) for grads in (train, query, drawn))
    expected = sum(
        solve(kind, drawn[name], query[name], 0.05) @ train[name].flatten(1).T for name in train
    )
    result = influence("score", run, *FLAGS, *flags, "--curvature", kind, *TRUE)
    assert torch.allclose(scores(result), expected, rtol=1e-8, atol=1e-10)
    assert "sample() of definition.py" in result.err


CONVOLUTION = with_outputs(DEFINITION).replace(
    "nn.Sequential(nn.Linear(4, 5)",
    "nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 5, 2), nn.Flatten(), nn.Linear(15, 5)",
)


@pytest.mark.parametrize("kind", ["ekfac", "kfac"])
def test_batches_resumed_passes_and_the_cache_give_the_same_labels(kind, make_run, influence, monkeypatch):  # fmt: skip
    run = make_run("run", CONVOLUTION)
    flags = (*FLAGS, *TRUE, "--curvature", kind)
    expected = scores(influence("score", run, *flags, "--cache", run / "one"))
    for more in (("--cache", "none", "--batch-size", "3"), ("--cache", run / "two", "--batch-size", "1")):  # fmt: skip
        table = scores(influence("score", run, *flags, *more))
        assert torch.allclose(table, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(scores(influence("score", run, *flags, "--seed", "1")), expected)
    assert not torch.allclose(scores(influence("score", run, *flags, "--fisher", "empirical")), expected)  # fmt: skip
    monkeypatch.setattr(passes, "RECORD_SECONDS", -1.0)
    write, calls = passes.write_partial, []

    def interrupted(path, sums, first):
        write(path, sums, first)
        stage = path.name.split("-")[1]
        if (stage, first) not in calls and first in (5, 15):
            calls.append((stage, first))
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "write_partial", interrupted)
    monkeypatch.setattr("influence_cli.extraction.memory_budget.UNIT_EXAMPLES", 5)
    for _ in range(40):
        result = influence("score", run, *flags, "--cache", run / "three", "--batch-size", "5")
        if result.code == 0:
            break
        assert result.code == 130
    assert len(calls) > 1
    assert torch.allclose(scores(result), expected, rtol=1e-9, atol=1e-12)


PADDED = """
import torch
from torch import nn
from torch.nn import functional as F


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(9, 3), nn.Linear(3, 4)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embedding(tokens)))

def model():
    return Tagger()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randint(1, 9, (2 + n % 3,), generator=generator), torch.randint(0, 4, (2 + n % 3,), generator=generator)) for n in range(number)]

def train_data():
    return examples(0, 20)

def query_data():
    return examples(1, 6)

def collate(items):
    longest = max(len(tokens) for tokens, _ in items)
    rows = [F.pad(torch.stack(item), SIDE) for item in items for SIDE in [PAD]]
    tokens = torch.stack([row[0] for row in rows])
    return {"tokens": tokens, "labels": torch.where(tokens == 0, -100, torch.stack([row[1] for row in rows]))}

def outputs(model, batch):
    return model(batch["tokens"])

def loss(model, batch):
    return F.cross_entropy(outputs(model, batch).transpose(1, 2), batch["labels"], reduction="none").sum(1)

def sample(outputs, batch, generator):
    drawn = torch.multinomial(outputs[0].softmax(1), 1, generator=generator)[:, 0]
    return batch | {"labels": drawn[None]}
"""
SIDES = {"right": "(0, longest - len(item[0]))", "left": "(longest - len(item[0]), 0)"}


@pytest.mark.parametrize("side", SIDES)
def test_labels_of_padded_texts_do_not_depend_on_the_batch(side, make_run, influence):
    run = make_run("run", PADDED.replace("PAD]", SIDES[side] + "]"))
    flags = (*FLAGS, *TRUE, "--curvature", "fisher", "--cache", "none", "--batch-size")
    one = scores(influence("score", run, *flags, "1"))
    assert torch.allclose(scores(influence("score", run, *flags, "7")), one, rtol=1e-9, atol=1e-12)
    plain = scores(influence("score", run, *FLAGS, "--curvature", "fisher", "--damping", "0.05"))
    assert not torch.allclose(plain, one, rtol=1e-3)


def test_drawn_labels_follow_the_probabilities():
    from influence_cli.extraction.label_losses import LabelLoss

    outputs = torch.tensor([[0.0, 1.0, -1.0]]).repeat(4000, 1)
    generators = [torch.Generator().manual_seed(n) for n in range(4000)]
    drawn = LabelLoss(0).draw(outputs, torch.zeros(4000, dtype=torch.int64), generators)
    shares = torch.bincount(drawn, minlength=3) / 4000
    errors = (outputs[0].softmax(0) * (1 - outputs[0].softmax(0)) / 4000).sqrt()
    assert ((shares - outputs[0].softmax(0)).abs() < 4 * errors).all()


def test_losses_without_known_labels_are_refused(make_run, influence):
    flags = (*FLAGS, *TRUE)
    refused(
        influence("score", make_run("one"), *flags),
        1,
        "definition.py lacks outputs(model, batch)",
        "def outputs(model, batch): return model(batch[0])",
        "--fisher empirical",
    )
    smooth = with_outputs(DEFINITION).replace('reduction="none")', 'reduction="none", label_smoothing=0.1)')  # fmt: skip
    absolute = with_outputs(SQUARED).replace("C * ", "").replace("square()", "abs()")
    for name, definition in (("smooth", smooth), ("absolute", absolute)):
        refused(
            influence("score", make_run(name, definition), *flags),
            1,
            "no cross-entropy of one label",
            "def sample(outputs, batch, generator)",
        )


def test_a_loss_of_another_form_for_some_examples_is_refused(make_run, influence):
    """The sample of 16 that is compared first has none of them."""
    definition = with_outputs(MANY).replace(
        'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
        "rare = (batch[0][:, 0] == train_data().tensors[0][17, 0]).to(batch[0].dtype)\n"
        '    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (1 + rare)',
    ).replace(f"x.repeat({COPIES}, 1), y.repeat({COPIES})", "x, y")  # fmt: skip
    refused(
        influence("score", make_run("run", definition), *FLAGS[:2], "--top", "3", *TRUE),
        1,
        "has another form for example 17",
        "def sample(outputs, batch, generator)",
    )


def test_a_sample_that_returns_another_batch_is_refused(make_run, influence):
    definition = with_outputs(DEFINITION) + "\ndef sample(outputs, batch, generator):\n    return batch[0], batch[1][None]\n"  # fmt: skip
    refused(
        influence("score", make_run("run", definition), *FLAGS, *TRUE),
        1,
        "sample() in definition.py returned another batch than it got",
        "with other labels",
    )
    definition = with_outputs(DEFINITION) + "\ndef sample(outputs, batch):\n    return batch\n"
    refused(
        influence("score", make_run("two", definition), *FLAGS, *TRUE),
        1,
        "sample() in definition.py does not take the arguments",
        "def sample(outputs, batch, generator)",
    )


def test_labels_that_do_not_fit_into_a_batch_are_refused(make_run, influence):
    definition = PADDED.replace("PAD]", SIDES["right"] + "]").replace(
        "return {", "tokens = tokens.flip(1) if len(items) > 1 else tokens\n    rows = [row.flip(1) for row in rows] if len(items) > 1 else rows\n    return {"
    )  # fmt: skip
    run = make_run("run", definition)
    flags = (*FLAGS, *TRUE, "--cache", "none")
    refused(influence("score", run, *flags, "--batch-size", "5"), 1, "do not fit into a batch", "--batch-size 1")  # fmt: skip
    assert influence("score", run, *flags, "--batch-size", "1").code == 0


def test_another_method_has_no_labels_to_draw(make_run, influence):
    refused(
        influence("score", make_run(), "--fisher", "true"),
        2,
        "--fisher does not apply to --method tracin",
        "influence",
    )
