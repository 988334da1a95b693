"""Influence functions by the command line, against dense float64 references of each approximation."""

import shutil

import pytest
import torch
from torch.func import functional_call, grad, vmap

from influence_cli.preconditioners import passes
from influence_cli.preconditioners.kinds import KINDS
from tests.conftest import DEFINITION
from tests.refusals import refused

FLAGS = ("--method", "influence", "--precision", "float64", "--top", "all")


def load(run):
    space: dict = {"__name__": "a_definition"}
    exec((run / "definition.py").read_text(), space)
    return space


def gradients(run, step=20):
    """Of both splits: name -> (N, *shape), by torch.func in float64."""
    from safetensors.torch import load_model

    space = load(run)
    model = space["model"]()
    load_model(model, str(run / f"checkpoints/step-{step:06d}.safetensors"))
    model = model.double().eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(values, x, y):
        class Bound:
            def __call__(self, inputs):
                return functional_call(model, values, (inputs,))

        return space["loss"](Bound(), (x[None], y[None]))[0]

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))
    splits = []
    for data in (space["train_data"](), space["query_data"]()):
        x, y = data.tensors
        splits.append(per_example(parameters, x.double() if x.is_floating_point() else x, y))
    return splits


def blocks(kind, grads):
    """Name -> (N, O, I + 1) gradients of a weight and its bias as one matrix; of fisher each parameter."""
    if kind == "fisher":
        return grads
    joint = dict(grads)
    for name in [name for name in grads if name.endswith("bias")]:
        bias, weight = joint.pop(name), name.replace("bias", "weight")
        joint[weight] = torch.cat([grads[weight].flatten(2), bias[:, :, None]], 2)
    return joint


def solve(kind, train, query, damping):
    """(Q, D) by dense matrices of one parameter."""
    count, flat = len(train), train.flatten(1)
    matrix = train.reshape(count, train.shape[1], -1) if train.dim() > 2 else train[:, :, None]
    fisher = flat.T @ flat / count
    left, right = (matrix @ matrix.mT).mean(0), (matrix.mT @ matrix).mean(0)
    if kind == "shampoo":
        fisher = torch.kron(left, right) / left.trace()
    auto = 0.1 * float(fisher.trace()) / len(fisher)
    return torch.linalg.solve(
        fisher + (damping or auto) * torch.eye(len(fisher), dtype=torch.float64), query.flatten(1).T
    ).T


def scores(result, queries=6, examples=20):
    assert result.code == 0, result.err
    table = torch.zeros(queries, examples, dtype=torch.float64)
    for row in result.rows:
        table[int(row["query"]), int(row["train"])] += float(row["score"])
    return table


@pytest.mark.parametrize("kind", ["fisher", "shampoo"])
@pytest.mark.parametrize("damping", [None, 0.05])
def test_scores_are_products_through_the_dense_inverse(kind, damping, make_run, influence):
    run = make_run()
    train, query = (blocks(kind, grads) for grads in gradients(run))
    expected = sum(
        solve(kind, train[name], query[name], damping) @ train[name].flatten(1).T for name in train
    )
    flags = () if damping is None else ("--damping", str(damping))
    computed = scores(influence("score", run, *FLAGS, "--curvature", kind, *flags))
    assert torch.allclose(computed, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_kronecker_factors_are_inputs_and_output_gradients(kind, make_run, influence):
    """The reference takes inputs, followed by 1, and output gradients of the layers by autograd."""
    from safetensors.torch import load_model

    run = make_run()
    space = load(run)
    model = space["model"]()
    load_model(model, str(run / "checkpoints/step-000020.safetensors"))
    model = model.double()
    train, query = (blocks(kind, grads) for grads in gradients(run))
    activations = {}

    def keep(name):
        def hook(module, inputs, output):
            output.retain_grad()
            activations[name] = inputs[0], output

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(keep(name))
    data = space["train_data"]()
    space["loss"](model, (data.tensors[0].double(), data.tensors[1])).sum().backward()
    expected = torch.zeros(6, 20, dtype=torch.float64)
    for name, grads in train.items():
        inputs, output = activations[name.removesuffix(".weight")]
        inputs = torch.cat([inputs.detach(), torch.ones(20, 1)], 1)
        outer, inner = output.grad.T @ output.grad / 20, inputs.T @ inputs / 20
        basis = torch.kron(
            torch.linalg.eigh(outer).eigenvectors, torch.linalg.eigh(inner).eigenvectors
        )
        flat = grads.flatten(1)
        if kind == "kfac":
            values = torch.kron(
                torch.linalg.eigh(outer).eigenvalues, torch.linalg.eigh(inner).eigenvalues
            )
        else:
            values = (flat @ basis).square().mean(0)
        expected += ((query[name].flatten(1) @ basis) / (values + 0.1)) @ basis.T @ flat.T
    computed = scores(influence("score", run, *FLAGS, "--curvature", kind, "--damping", "0.1"))
    assert torch.allclose(computed, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_large_damping_gives_the_order_of_grad_dot(kind, make_run, influence):
    run = make_run()
    damped = scores(influence("score", run, *FLAGS, "--curvature", kind, "--damping", "1e9"))
    plain = scores(influence("score", run, "--method", "grad-dot", *FLAGS[2:]))
    assert torch.allclose(damped * 1e9, plain, rtol=1e-6, atol=1e-10)


def test_layers_sum_to_the_score_and_queries_to_their_mean(make_run, influence):
    run = make_run()
    plain = scores(influence("score", run, *FLAGS))
    assert torch.allclose(
        scores(influence("score", run, *FLAGS, "--by", "layer")), plain, rtol=1e-12
    )
    rows = influence("score", run, *FLAGS, "--sum-queries").rows
    mean = torch.zeros(20, dtype=torch.float64)
    for row in rows:
        mean[int(row["train"])] = float(row["score"])
    assert torch.allclose(mean, plain.mean(0), rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_cache_and_with_other_batches_scores_are_the_same(kind, make_run, influence):
    run = make_run()
    flags = (*FLAGS, "--curvature", kind)
    cached = scores(influence("score", run, *flags))
    assert torch.equal(scores(influence("score", run, *flags)), cached)
    assert torch.allclose(
        scores(influence("score", run, *flags, "--cache", "none", "--batch-size", "7")),
        cached,
        rtol=1e-9,
        atol=1e-12,
    )


def test_the_curvature_is_that_of_all_training_examples(make_run, influence):
    """--train selects what is ranked, not what the curvature is fitted to."""
    run = make_run()
    every = influence("score", run, *FLAGS)
    some = influence("score", run, *FLAGS, "--train", "3,5", "--cache", run / "other")
    wanted = [row for row in every.rows if row["train"] in ("3", "5")]
    expected, ranked = (
        {(row["query"], row["train"]): float(row["score"]) for row in rows}
        for rows in (wanted, some.rows)
    )
    assert ranked == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stage", ["moments", "diagonal"])
def test_a_killed_pass_goes_on_with_the_same_bytes(stage, make_run, influence, monkeypatch):
    run = make_run()
    expected = influence("score", run, *FLAGS, "--cache", run / "one").out
    monkeypatch.setattr(passes, "RECORD_SECONDS", -1.0)
    influence("cache", run, "--precision", "float64", "--batch-size", "4")
    whole, calls = passes.write_partial, []

    def interrupted(path, sums, first):
        whole(path, sums, first)
        calls.append(first)
        if stage in path.name or path.name.startswith("partial"):
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "write_partial", interrupted)
    monkeypatch.setattr("influence_cli.cache.store.UNIT_EXAMPLES", 4)
    for _ in range(40):
        result = influence("score", run, *FLAGS)
        if result.code == 0:
            break
        assert result.code == 130
    assert len(calls) > 1
    assert result.out == expected


def test_damping_is_named_and_wrong_values_are_refused(make_run, influence):
    run = make_run()
    assert "--damping auto:" in influence("score", run, *FLAGS).err
    for value in ("0", "-1", "nan", "much"):
        refused(
            influence("score", run, *FLAGS, "--damping", value),
            2,
            f"--damping '{value}'",
            "a number above 0",
        )
    refused(
        influence("score", run, *FLAGS, "--curvature", "gauss"), 2, "--curvature gauss: unknown"
    )


def test_gradients_of_zero_need_a_damping(make_run, influence):
    definition = DEFINITION.replace('reduction="none")', 'reduction="none") * 0')
    run = make_run("run", definition)
    refused(influence("score", run, *FLAGS), 1, "every training gradient is 0", "--damping X")


def test_a_damaged_file_of_sums_is_refused(make_run, influence):
    run = make_run()
    influence("score", run, *FLAGS)
    path = next((run / ".influence/preconditioners").rglob("moments-*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    refused(influence("score", run, *FLAGS), 1, "is damaged", "delete it")


def test_what_a_parameter_falls_back_to_is_named(make_run, influence):
    definition = DEFINITION.replace(
        "def model():",
        "class Squared(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return torch.einsum('bi,oi->bo', x, self.weight.square())\n\n"
        "def model():",
    ).replace("nn.Sequential(nn.Linear(4, 5)", "nn.Sequential(Squared(4, 5, bias=False)")
    result = influence("score", make_run("run", definition), *FLAGS)
    assert result.code == 0, result.err
    assert "use the approximation shampoo" in result.err and "0.weight" in result.err


@pytest.mark.parametrize(
    "flags", [(), ("--fisher", "true"), ("--curvature", "hessian", "--damping", "3")]
)
def test_other_training_data_of_the_same_length_has_its_own_curvature(
    flags, tmp_path, make_run, influence
):
    path = tmp_path / "scale.txt"
    path.write_text("1")
    definition = DEFINITION.replace(
        "def train_data():\n    return examples(0, 20)",
        "def train_data():\n    x, y = examples(0, 20).tensors\n"
        f"    scale = float(open({str(path)!r}).read())\n"
        "    return torch.utils.data.TensorDataset(x * scale, y)",
    )
    definition += "\ndef outputs(model, batch):\n    return model(batch[0])\n"
    run, flags = make_run("run", definition), (*FLAGS, *flags)
    before = scores(influence("score", run, *flags))
    path.write_text("2")
    for folder in (run / ".influence").iterdir():  # stored gradients would be refused
        if folder.is_dir() and folder.name != "preconditioners":
            shutil.rmtree(folder)
    after = scores(influence("score", run, *flags))
    assert torch.equal(after, scores(influence("score", run, *flags, "--cache", run / "new")))
    assert not torch.allclose(after, before)
