"""What is reported of projections and narrow stores, against the same from plain autograd, explicit matrices and plain sums."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.api.opening import Opened
from influence_cli.cli.opening import open_shared
from influence_cli.cli.options import Shared
from influence_cli.diagnostics.fidelity import (
    Fidelity,
    check_fidelity,
    measure_fidelity,
    search_projection,
)
from influence_cli.gradients.projection_kinds import KINDS
from tests import reference
from tests.conftest import build_run
from tests.gradients.test_projection import by_matrix
from tests.refusals import replaced
from tests.training import definition_of, load, train

DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up, self.down, self.out = nn.Embedding(13, 5), nn.Linear(5, 12), nn.Linear(12, 7), nn.Linear(7, 3)

    def forward(self, ids):
        places = torch.arange(1.0, 7.0, dtype=self.out.weight.dtype)[:, None] / 3  # no two examples alike
        return self.out(torch.tanh((self.down(torch.tanh(self.up(self.words(ids)))) * places).mean(1)))

def model():
    return Model().double()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (number, 6), generator=generator)
    return torch.utils.data.TensorDataset(ids, ids.sum(1) % 3)

def train_data():
    return examples(0, 230)

def query_data():
    return examples(1, 27)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
NAMES = [f"{layer}.{part}" for layer in ("up", "down", "out") for part in ("weight", "bias")]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Really trained; six checkpoints, more examples and queries than are looked at."""
    return train(
        tmp_path_factory.mktemp("fidelity") / "run",
        steps=30,
        every=6,
        batch=24,
        rate=0.5,
        definition=DEFINITION,
    )


def opened(run: Path, **flags: object) -> Opened:
    return open_shared(Shared(run=run, cache=flags.pop("cache", "none"), quiet=True, **flags))  # type: ignore[arg-type]


def asked(of: Opened) -> tuple:
    ids = {"train": range(len(of.run.train)), "query": range(len(of.run.query))}
    return of.gradients, of.checkpoints, list(of.columns), ids


def evenly(count: int, most: int) -> list[int]:
    return (
        [round(k * (count - 1) / (most - 1)) for k in range(most)]
        if count > most
        else list(range(count))
    )


def gradients(run: Path, steps: Sequence[int]) -> list[tuple[dict, dict]]:
    """(training, query) gradients of the examples looked at, one at a time, at each of these checkpoints."""
    space = definition_of(run)
    model, found = space["model"](), []
    for step in steps:
        load(model, run, step)
        parts = []
        for data, most in ((space["train_data"](), 200), (space["query_data"](), 20)):
            singles = [torch.utils.data.default_collate([data[i]]) for i in evenly(len(data), most)]
            parts.append(reference.gradients(model, space["loss"], singles))
        found.append((parts[0], parts[1]))
    return found


def scores(
    found: Sequence[tuple[dict, dict]], kind: str | None = None, numbers: int = 0, seed: int = 0
) -> np.ndarray:
    """(Q, N) sums over checkpoints of plain inner products, of the gradients or of their projections."""
    total = 0
    for pair in found:
        ours, theirs = (by_matrix(part, kind, numbers, seed) if kind else part for part in pair)
        total = total + reference.flat(theirs) @ reference.flat(ours).T
    return total.numpy()


def ranks(row: np.ndarray) -> np.ndarray:
    return np.array([(row < value).sum() + ((row == value).sum() + 1) / 2 for value in row])


def figures(found: np.ndarray, exact: np.ndarray) -> tuple[float, float, float, float]:
    """Relative error, Pearson, Spearman, top-10 overlap."""
    pairs = list(zip(found, exact, strict=True))
    linear = [np.corrcoef(a, b)[0, 1] for a, b in pairs]
    ranked = [np.corrcoef(ranks(a), ranks(b))[0, 1] for a, b in pairs]
    tops = [
        [set(sorted(range(len(row)), key=lambda i, row=row: -row[i])[:10]) for row in pair]
        for pair in pairs
    ]
    return (
        math.sqrt(((found - exact) ** 2).sum() / (exact**2).sum()),
        float(np.mean(linear)),
        float(np.mean(ranked)),
        float(np.mean([len(a & b) / 10 for a, b in tops])),
    )


def reported(found: Fidelity) -> tuple[float, float, float, float]:
    return found.error, found.pearson, found.spearman, found.overlap


# ---------------------------------------------------------------- what is reported
@pytest.fixture(scope="module")
def looked_at(run) -> list[tuple[dict, dict]]:
    """At three of the six checkpoints, the first and the last among them."""
    return gradients(run, [0, 12, 30])


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_explicit_matrices(kind, run, looked_at):
    of = opened(run, project=16, projection=kind, seed=2)
    [found] = measure_fidelity(*asked(of))
    assert found.kept == f"{kind} 16"
    assert found.pairs == (20, 200)
    assert found.numbers == 4 * 16 + 12 + 7 + 3  # of 65, 60, 84 and 21 numbers; the biases
    exact = scores(looked_at)
    projected = scores(looked_at, kind, 16, 2)
    assert reported(found) == pytest.approx(figures(projected, exact), rel=1e-9)
    assert 0.02 < found.error < 2
    assert found.spearman < 0.995


def test_the_error_that_theory_allows(run, looked_at):
    """2 standard deviations of all pairs together: of two gradients of norms a and b, at most a b times those of the papers."""
    exact = scores(looked_at)
    sizes = {"words.weight": 65, "up.weight": 60, "down.weight": 84, "out.weight": 21}
    variances = {
        "tensor-sketch": 8 / 16,
        "sparse": 2 / 16,
        "khatri-rao": 9 / 16,
        "kronecker": (1 + 2 / 4) ** 2 - 1,
    }
    assert set(variances) == set(KINDS)
    norms = {
        name: sum(
            torch.outer(q[name].flatten(1).norm(dim=1), g[name].flatten(1).norm(dim=1))
            for g, q in looked_at
        ).numpy()
        for name in sizes
    }
    for kind, variance in variances.items():
        [found] = measure_fidelity(*asked(opened(run, project=16, projection=kind)))
        expected = 2 * math.sqrt(
            variance * sum((value**2).sum() for value in norms.values()) / (exact**2).sum()
        )
        assert found.allowed == pytest.approx(expected, rel=1e-6), kind


@pytest.mark.parametrize("kind", KINDS)
def test_errors_stay_below_what_is_allowed(kind, run):
    for numbers in (4, 16, 49):
        for seed in (0, 1, 2):
            [found] = measure_fidelity(
                *asked(opened(run, project=numbers, projection=kind, seed=seed, steps="12:"))
            )
            assert 0.01 * found.allowed < found.error < found.allowed, (numbers, seed)


def test_a_store_is_compared_with_what_it_stores(run, looked_at):
    """Projected, then int8: the first row is the projection's against exact scores, the second what is read back, against the same."""
    of = opened(run, cache=str(run / "elsewhere"), project=16, store="int8")
    projection, store = measure_fidelity(*asked(of))
    assert not any(run.rglob("0*.safetensors"))  # a look, that keeps nothing
    before = scores(looked_at, "tensor-sketch", 16)
    assert reported(projection) == pytest.approx(figures(before, scores(looked_at)), rel=1e-9)
    after = np.zeros_like(before)
    for pair in looked_at:
        ours, theirs = (rounded(by_matrix(part, "tensor-sketch", 16)) for part in pair)
        after += (reference.flat(theirs) @ reference.flat(ours).T).numpy()
    assert store.kept == "tensor-sketch 16 in int8"
    assert reported(store) == pytest.approx(figures(after, scores(looked_at)), rel=1e-4)
    assert reported(store) != pytest.approx(reported(projection), rel=1e-6)
    assert store.error < store.allowed


def rounded(kept: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """To 127ths of each row's largest number."""
    scales = {name: value.abs().amax(1, keepdim=True) / 127 for name, value in kept.items()}
    return {
        name: torch.where(scales[name] > 0, (value / scales[name]).round() * scales[name], value)
        for name, value in kept.items()
    }


@pytest.mark.parametrize("store", ["float32", "float16", "bfloat16", "int8"])
def test_narrower_stores_of_exact_gradients_are_reported(store, run):
    digits = {"float32": 24, "float16": 11, "bfloat16": 8, "int8": 7}[store]
    [found] = measure_fidelity(*asked(opened(run, cache=str(run / "elsewhere"), store=store)))
    assert found.kept == store
    assert found.numbers == 65 + 60 + 84 + 21 + 12 + 7 + 3
    assert 0.001 < found.error * 2**digits < 4
    assert found.error < found.allowed


def test_nothing_is_reported_where_nothing_is_lost(run, tmp_path):
    assert measure_fidelity(*asked(opened(run))) == []
    assert measure_fidelity(*asked(opened(run, cache=str(tmp_path / "a"), store="float64"))) == []
    assert (
        measure_fidelity(*asked(opened(run, cache=str(tmp_path / "b"), precision="float32"))) == []
    )
    assert (
        measure_fidelity(
            *asked(opened(run, cache=str(tmp_path / "c"), precision="float32", store="float64"))
        )
        == []
    )
    assert check_fidelity(*asked(opened(run)), None, None) == []


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_projection_that_keeps_every_parameter_exactly_is_within_its_bound(precision, run):
    """Not of error 0: the same numbers are multiplied in another form."""
    found = check_fidelity(*asked(opened(run, project=4096, precision=precision)), None, None)
    assert [finding.passed for finding in found] == [True]
    assert found[0].allowed < (1e-4 if precision == "float32" else 1e-12)


def test_scores_that_do_not_vary_correlate_with_nothing(tmp_path):
    flat = replaced(
        DEFINITION,
        (
            'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")',
            "return 0 * model(batch[0]).sum(1)",
        ),
    )
    [found] = measure_fidelity(*asked(opened(build_run(tmp_path / "run", flat), project=4)))
    assert found.reached == 0
    assert math.isnan(found.pearson)
    assert found.error == 0


# ---------------------------------------------------------------- the smallest K
def test_the_smallest_size_is_the_first_whose_correlations_both_reach_the_target(run, looked_at):
    exact, target = scores(looked_at), 0.97
    by_hand = []
    for numbers in (16, 32, 64, 128):
        error, linear, ranked, _ = figures(scores(looked_at, "sparse", numbers, 1), exact)
        by_hand.append((numbers, error, linear, ranked))
        if min(linear, ranked) >= target:
            break
    assert len(by_hand) in (2, 3)  # neither the first nor one that keeps all exactly
    of = opened(run, project=8, seed=1)  # its kind and size are not those searched for, its seed is
    found = search_projection(*asked(of), "sparse", target)
    assert [one.kept for one in found] == [f"sparse {numbers}" for numbers, *_ in by_hand]
    for one, (_, *wanted) in zip(found, by_hand, strict=True):
        assert (one.error, one.pearson, one.spearman) == pytest.approx(tuple(wanted), rel=1e-9)
    last = check_fidelity(*asked(of), "sparse", target)[-1]
    assert last.check == "target"
    assert last.subject == f"sparse {by_hand[-1][0]}: the first that reaches it"
    assert last.passed
    assert last.error == pytest.approx(1 - min(by_hand[-1][2:]), rel=1e-9)


WIDE = replaced(
    DEFINITION,
    (
        "nn.Embedding(13, 5), nn.Linear(5, 12), nn.Linear(12, 7)",
        "nn.Embedding(13, 50), nn.Linear(50, 40), nn.Linear(40, 7)",
    ),
    ("examples(0, 230)", "examples(0, 30)"),
)


@pytest.mark.parametrize(
    ("kind", "expected"), [(None, 2048), ("sparse", 2048), ("kronecker", 4096)]
)
def test_ladders_go_on_until_all_is_exact(kind, expected, tmp_path):
    """A weight of 2,000 numbers: 1,024 are too few for such a target, and 2,048 keep it as it is."""
    of = opened(build_run(tmp_path / "run", WIDE))
    found = check_fidelity(*asked(of), kind, 0.99999)
    assert [finding.subject for finding in found] == [
        f"{kind or 'tensor-sketch'} {expected}: the first that reaches it"
    ]
    sizes = [
        int(one.kept.split()[1])
        for one in search_projection(*asked(of), kind or "tensor-sketch", 0.99999)
    ]
    if kind == "kronecker":
        assert sizes == [16, 64, 256, 1024, 4096]
        assert all(math.isqrt(size) ** 2 == size for size in sizes)
    else:
        assert sizes == [16, 32, 64, 128, 256, 512, 1024, 2048]


@pytest.mark.parametrize(("kind", "last"), [("tensor-sketch", 8192), ("kronecker", 16384)])
def test_a_target_out_of_reach_fails_at_the_last_size(kind, last, tmp_path):
    """A weight of 18,000 numbers."""
    large = replaced(
        WIDE,
        (
            "nn.Embedding(13, 50), nn.Linear(50, 40), nn.Linear(40, 7)",
            "nn.Embedding(13, 150), nn.Linear(150, 120), nn.Linear(120, 7)",
        ),
    )
    of = opened(build_run(tmp_path / "run", large, steps=(10,)), layers=["up", "out"])
    [found] = check_fidelity(*asked(of), kind, 0.999999)
    assert found.subject == f"{kind} {last}: the last tried"
    assert not found.passed
    assert found.allowed == pytest.approx(1e-6)


def test_a_target_judges_what_is_kept_too(run):
    of = opened(run, project=16)
    found = check_fidelity(*asked(of), None, 0.99)
    assert [(finding.check, finding.subject.split(":")[0]) for finding in found[:2]] == [
        ("fidelity", "tensor-sketch 16"),
        ("target", "tensor-sketch 16"),
    ]
    kept = measure_fidelity(*asked(of))[0]
    assert not found[1].passed
    assert found[1].error == pytest.approx(1 - min(kept.pearson, kept.spearman))
    assert found[2].passed
