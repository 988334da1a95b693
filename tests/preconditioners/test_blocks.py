"""A weight and its bias as one block, against autograd of one example at a time and dense matrices.

The reference is E (S kron A) E^T of the matrices [G | g] by numpy, from hooks on single examples.
"""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from influence_cli.gradients.forms import Dense, Factors
from influence_cli.preconditioners import passes
from influence_cli.preconditioners.blocks import Block, join_biases
from influence_cli.run.parameters import list_columns
from tests.conftest import DEFINITION
from tests.methods.test_influence import FLAGS, load, scores

SEQUENTIAL = "nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))"
LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'
PADDED = """x = torch.stack([batch[0], batch[0] ** 2, 1 - batch[0]], 1)
    lengths = 1 + (batch[0][:, :1] * 1000).long().remainder(3)
    mask = (torch.arange(3) < lengths).to(x.dtype)
    return F.cross_entropy((model(x) * mask[:, :, None]).sum(1), batch[1], reduction="none")"""
WIDE = "nn.Sequential(nn.Linear(4, 40), nn.Tanh(), nn.Linear(40, 3))"
CONV1D = """
class Conv1D(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 2)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1)


def model():"""
DEFINITIONS = {
    "one position": DEFINITION,
    "several positions and padding": DEFINITION.replace(SEQUENTIAL, WIDE).replace(LOSS, PADDED),
    "transposed weights": DEFINITION.replace(SEQUENTIAL, WIDE.replace("nn.Linear", "Conv1D"))
    .replace(LOSS, PADDED)
    .replace("def model():", CONV1D),
    "convolution": DEFINITION.replace(
        SEQUENTIAL,
        "nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3))",
    ),
}
DAMPING = 0.05


def homogeneous(layer, x):
    """(P, I + 1) inputs of the positions of one example, followed by 1."""
    if isinstance(layer, torch.nn.Conv2d):
        x = F.unfold(x, layer.kernel_size, padding=layer.padding).transpose(1, 2)
    x = x.detach().flatten(0, -2).numpy()
    return np.concatenate([x, np.ones((len(x), 1))], axis=1)


def examples(run, split):
    """Of each example, by layer: (P, O) output gradients and (P, I + 1) inputs, without padding."""
    from safetensors.torch import load_model

    space = load(run)
    model = space["model"]()
    load_model(model, str(run / "checkpoints/step-000020.safetensors"))
    model = model.double()
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
    calls = {}

    def keep(layer, inputs, output):
        output.retain_grad()
        calls[layer] = inputs[0], output

    for layer in layers.values():
        layer.register_forward_hook(keep)
    for x, y in space[split]():
        space["loss"](model, (x.double()[None], y[None])).sum().backward()
        example = {}
        for name, layer in layers.items():
            inputs, output = calls[layer]
            grad = output.grad.flatten(2).mT if output.dim() == 4 else output.grad
            grad = grad.flatten(0, -2).numpy()
            used = (grad != 0).any(1)
            example[name] = grad[used], homogeneous(layer, inputs)[used]
        yield example


def inverse(grads, positions, kind):
    """(H + damping)^{-1} of the matrices [G | g] of one layer: (D, D)."""
    left = sum(b.T @ b for b, _ in positions) / len(positions)
    right = sum(a.T @ a for _, a in positions) / sum(len(a) for _, a in positions)
    if kind == "shampoo":
        left = sum(grad @ grad.T for grad in grads) / len(grads)
        right = sum(grad.T @ grad for grad in grads) / len(grads) / np.trace(left)
    (left_values, left_basis), (right_values, right_basis) = map(np.linalg.eigh, (left, right))
    basis, values = np.kron(left_basis, right_basis), np.kron(left_values, right_values)
    if kind == "ekfac":
        values = sum((grad.ravel() @ basis) ** 2 for grad in grads) / len(grads)
    return (basis / (values + DAMPING)) @ basis.T


def reference(run, kind):
    """Layer -> (6, 20) scores, and (20,) products of training examples with themselves."""
    train, query = list(examples(run, "train_data")), list(examples(run, "query_data"))
    tables, own = {}, np.zeros(20)
    for name in train[0]:
        grads, queries = (
            [np.einsum("po,pi->oi", *example[name]) for example in split]
            for split in (train, query)
        )
        mapped = inverse(grads, [example[name] for example in train], kind)
        tables[name] = np.array([[q.ravel() @ mapped @ g.ravel() for g in grads] for q in queries])
        own += [g.ravel() @ mapped @ g.ravel() for g in grads]
    return tables, own


@pytest.mark.parametrize("kind", ["ekfac", "kfac", "shampoo"])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_weight_and_its_bias_are_one_matrix_in_the_curvature(name, kind, make_run, influence):
    run = make_run("run", DEFINITIONS[name])
    flags = ("--curvature", kind, "--damping", DAMPING)
    tables, own = reference(run, kind)
    plain = scores(influence("score", run, *FLAGS, *flags))
    np.testing.assert_allclose(plain, sum(tables.values()), rtol=1e-8, atol=1e-10)
    by_layer = influence("score", run, *FLAGS, *flags, "--by", "layer")
    assert torch.allclose(scores(by_layer), plain, rtol=1e-12)
    for layer, table in tables.items():
        rows = [row for row in by_layer.rows if row["layer"] == layer]
        assert len(rows) == 120
        for row in rows:
            expected = table[int(row["query"]), int(row["train"])]
            assert float(row["score"]) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    norms = influence("self", run, *FLAGS, *flags)
    assert {int(row["train"]): float(row["score"]) for row in norms.rows} == pytest.approx(
        dict(enumerate(own)), rel=1e-8
    )


@pytest.mark.parametrize("name", ["several positions and padding", "convolution"])
def test_a_killed_pass_over_joint_blocks_resumes_with_the_same_bytes(
    name, make_run, influence, monkeypatch
):
    run = make_run("run", DEFINITIONS[name])
    flags = (*FLAGS, "--batch-size", "6")
    expected = influence("score", run, *flags, "--cache", run / "one").out
    monkeypatch.setattr(passes, "RECORD_SECONDS", -1.0)
    write, stages = passes.write_partial, set()

    def interrupted(path, sums, first):
        write(path, sums, first)
        stages.add(path.name.split("-")[1])
        raise KeyboardInterrupt

    monkeypatch.setattr(passes, "write_partial", interrupted)
    for _ in range(30):
        result = influence("score", run, *flags)
        if result.code == 0:
            break
        assert result.code == 130
    assert {"moments", "diagonal"} <= stages
    assert result.out == expected


def test_weights_or_biases_alone_and_tied_ones_are_blocks_of_their_own():
    model = torch.nn.Module()
    model.first, model.second, model.third = (torch.nn.Linear(3, 3) for _ in range(3))
    model.third.weight = model.second.weight
    model.norm, model.up = torch.nn.LayerNorm(3), torch.nn.ConvTranspose1d(3, 3, 1)
    columns = list_columns(model)
    blocks = join_biases(model, columns, list(columns))
    assert blocks.pop("first.weight") == Block("first.weight", "first.bias")
    others = [name for name in columns if not name.startswith("first")]
    assert list(blocks) == others
    assert all(block == Block(name) for name, block in blocks.items())
    assert join_biases(model, columns, ["first.bias"]) == {"first.bias": Block("first.bias")}
    assert join_biases(model, columns, ["first.weight"]) == {"first.weight": Block("first.weight")}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("axis", [0, 1])
def test_joint_factors_are_the_joint_matrix_and_split_into_its_columns(axis):
    """Axis 0: the inputs of GPT-2's weights are rows."""
    weight = Factors((3, 4), normal(5, 2, 3), normal(5, 2, 4, seed=1))
    sums = (weight.right if axis == 0 else weight.left).sum(1)
    forms = {"w": weight, "b": Dense((sums.shape[1],), sums)}
    block = Block("w", "b", axis)
    joint = block.join(forms)
    assert isinstance(joint, Factors)
    matrix = weight.dense().values.view(5, 3, 4)
    expected = torch.cat([matrix, sums[:, None] if axis == 0 else sums[:, :, None]], 1 + axis)
    assert torch.allclose(joint.dense().values, expected.flatten(1))
    columns = block.split(joint.dense(), forms)
    assert torch.allclose(columns["w"].dense().values, weight.dense().values)
    assert torch.allclose(columns["b"].dense().values, sums)


def test_a_bias_with_other_positions_than_its_weight_is_joined_as_numbers():
    """Of a weight that is also used without its bias, the bias has fewer positions."""
    weight = Factors((3, 4), normal(5, 2, 3), normal(5, 2, 4, seed=1))
    forms = {"w": weight, "b": Dense((3,), weight.left[:, 0].clone())}
    joint = Block("w", "b").join(forms)
    assert isinstance(joint, Dense)
    assert torch.equal(joint.values.view(5, 3, 5)[:, :, 4], forms["b"].values)


def test_layers_of_selected_weights_leave_the_bias_out(make_run, influence):
    run = make_run()
    flags = (*FLAGS, "--curvature", "kfac", "--damping", DAMPING)
    joint = scores(influence("score", run, *flags, "--layers", "0"))
    weight = scores(influence("score", run, *flags, "--layers", "0.weight"))
    again = influence("score", run, *flags, "--layers", "0.weight", "--cache", run / "new")
    assert torch.allclose(scores(again), weight, rtol=1e-12)
    assert not torch.allclose(joint, weight, rtol=0.1)
