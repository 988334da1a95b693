"""K-FAC of layers whose inputs and output gradients the cache does not keep, against autograd's hooks and F.unfold."""

import pytest
import torch
from torch.nn import functional as F

from influence_cli.preconditioners import passes
from tests.conftest import DEFINITION
from tests.methods.test_influence import FLAGS, blocks, gradients, load, scores

SEQUENTIAL = "nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))"
MODELS = {
    "convolutions": "nn.Sequential(nn.Unflatten(1, (2, 1, 2)), nn.Conv2d(2, 4, 2, padding=1), nn.Tanh(), "
    "nn.Conv2d(4, 2, (1, 2), stride=2, groups=2), nn.Flatten(), nn.Linear(2, 3))",
    "many positions": "nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(), "
    "nn.Linear(4, 3))",
}
DAMPING = 0.1


def definition_of(name):
    return DEFINITION.replace(SEQUENTIAL, MODELS[name])


def positions(layer, x, g):
    """(P, O) output gradients and (P, D/O) inputs, followed by 1, of all examples; of a convolution's groups one after the other."""
    if isinstance(layer, torch.nn.Linear):
        return g.flatten(0, -2), with_ones(x.flatten(0, -2))
    pads = layer.padding[::-1]
    x = F.pad(x, [pad for side in pads for pad in (side, side)])
    lefts, rights = [], []
    for group in range(layer.groups):
        some = x.chunk(layer.groups, 1)[group]
        patches = F.unfold(some, layer.kernel_size, stride=layer.stride)  # (B, D/O, places)
        rows = torch.zeros_like(g)
        width = g.shape[1] // layer.groups
        rows[:, group * width : (group + 1) * width] = g[:, group * width : (group + 1) * width]
        lefts.append(rows.flatten(2).transpose(1, 2).flatten(0, 1))
        rights.append(patches.transpose(1, 2).flatten(0, 1))
    return torch.cat(lefts), with_ones(torch.cat(rights))


def with_ones(rows):
    return torch.cat([rows, torch.ones(len(rows), 1)], 1)


def reference(run, kind):
    """(6, 20) scores by dense Kronecker products."""
    from safetensors.torch import load_model

    space = load(run)
    model = space["model"]()
    load_model(model, str(run / "checkpoints/step-000020.safetensors"))
    model = model.double()
    train, query = (blocks(kind, grads) for grads in gradients(run))
    activations = {}

    def keep(module, inputs, output):
        output.retain_grad()
        activations[module] = inputs[0].detach(), output

    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "weight")}
    for layer in layers.values():
        layer.register_forward_hook(keep)
    x, y = space["train_data"]().tensors
    space["loss"](model, (x.double(), y)).sum().backward()
    expected = torch.zeros(6, 20, dtype=torch.float64)
    for name, grads in train.items():
        layer = layers[name.removesuffix(".weight")]
        left, right = positions(layer, activations[layer][0], activations[layer][1].grad)
        used = left.ne(0).any(1)
        outer, inner = left[used].T @ left[used] / 20, right[used].T @ right[used] / int(used.sum())
        pairs = [torch.linalg.eigh(side) for side in (outer, inner)]
        basis = torch.kron(*(pair.eigenvectors.contiguous() for pair in pairs))
        flat = grads.flatten(1)
        values = torch.kron(*(pair.eigenvalues for pair in pairs))
        if kind == "ekfac":
            values = (flat @ basis).square().mean(0)
        expected += ((query[name].flatten(1) @ basis) / (values + DAMPING)) @ basis.T @ flat.T
    return expected


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("flags", [(), ("--cache", "none", "--batch-size", "3")])
def test_layers_that_are_stored_dense_have_their_own_factors(name, kind, flags, make_run, influence):  # fmt: skip
    run = make_run("run", definition_of(name))
    result = influence("score", run, *FLAGS, *flags, "--curvature", kind, "--damping", DAMPING)
    assert torch.allclose(scores(result), reference(run, kind), rtol=1e-8, atol=1e-10)
    assert "approximation" not in result.err


def test_a_layer_whose_units_have_different_forms_has_one_kind_of_sums(make_run, influence, monkeypatch):  # fmt: skip
    """Short texts are stored as factors, long ones dense; a text's padding counts as no position."""
    definition = DEFINITION.replace(SEQUENTIAL, "nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))")
    definition = definition.replace(
        'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
        "outputs, mask = model(batch[0]), batch[2]\n"
        "    return (outputs.square().sum(2) * mask).sum(1) + F.cross_entropy(outputs[:, 0], batch[1], reduction='none')",
    )
    definition += """

def collate(items):
    lengths = [1 + 4 * (int(item[0][0] * 1000) % 2 == 0) for item in items]
    longest = max(lengths)
    x = torch.stack([torch.stack([item[0] * (1 + t) for t in range(longest)]) for item in items])
    mask = torch.stack([(torch.arange(longest) < length).to(x.dtype) for length in lengths])
    return x, torch.stack([item[1] for item in items]), mask
"""
    tables = []
    for size in (1, 2, 32):
        monkeypatch.setattr("influence_cli.extraction.memory_budget.UNIT_EXAMPLES", size)
        run = make_run(f"run{size}", definition)
        tables.append(scores(influence("score", run, *FLAGS, "--curvature", "kfac")))
    for table in tables[1:]:
        assert torch.allclose(table, tables[0], rtol=1e-8, atol=1e-10)


def test_without_a_cache_one_pass_sums_the_factors_of_all_layers(make_run, influence, monkeypatch):
    stages, run_pass = [], passes.run_pass

    def counted(fit, names, stage, sums, work):
        stages.append(stage)
        run_pass(fit, names, stage, sums, work)

    monkeypatch.setattr("influence_cli.preconditioners.fit.run_pass", counted)
    run = make_run(definition=definition_of("convolutions"))
    done = influence("score", run, *FLAGS, "--curvature", "ekfac", "--cache", "none")
    assert done.code == 0, done.err
    assert stages == ["positions", "diagonal"]


def test_a_killed_pass_over_positions_resumes(make_run, influence, monkeypatch):
    run = make_run("run", definition_of("convolutions"))
    flags = (*FLAGS, "--batch-size", "3")
    expected = influence("score", run, *flags, "--cache", run / "one").out
    monkeypatch.setattr(passes, "RECORD_SECONDS", -1.0)
    write, counts = passes.write_partial, []

    def interrupted(path, sums, first):
        write(path, sums, first)
        counts.append((path.name.split("-")[1], first))
        raise KeyboardInterrupt

    monkeypatch.setattr(passes, "write_partial", interrupted)
    for _ in range(40):
        result = influence("score", run, *flags)
        if result.code == 0:
            break
        assert result.code == 130
    assert ("positions", 3) in counts and ("positions", 18) in counts
    assert result.out == expected


def test_padding_in_front_of_a_transposed_weight_is_no_position():
    """GPT-2's layers have inputs on the left: padded positions have inputs, and no output gradients."""
    from influence_cli.gradients.forms import Factors
    from influence_cli.preconditioners.block_statistics import PositionSums

    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(4, 3, n, generator=generator, dtype=torch.float64) for n in (2, 5))
    right[:, 1:] = 0
    sums = PositionSums.of(Factors((2, 5), left, right))
    assert sums.positions == 4
    assert torch.allclose(sums.left, left[:, 0].T @ left[:, 0])
