"""`--project K` and narrow stores through the real command, against explicit matrices of batch-size-one autograd gradients, float64."""

import hashlib
import json
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.cache.store import Store
from influence_cli.extraction import memory_budget
from influence_cli.gradients.projection_kinds import KINDS
from tests import reference
from tests.conftest import build_run
from tests.forked import Job
from tests.gradients.test_projection import by_matrix
from tests.refusals import refused, replaced
from tests.training import definition_of, load, train

DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.conv = nn.Embedding(13, 5), nn.Conv1d(5, 6, 2)
        self.mix, self.out = nn.Linear(6, 9), nn.Linear(9, 3)

    def forward(self, ids):
        h = torch.tanh(self.conv(self.words(ids).transpose(1, 2))).transpose(1, 2)
        return self.out(torch.tanh(self.mix(h)).mean(1))

def model():
    return Model().double()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 13, (number, 6), generator=generator)
    return torch.utils.data.TensorDataset(ids, torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 30)

def query_data():
    return examples(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
SIZES = {
    "words.weight": 65,
    "conv.weight": 60,
    "mix.weight": 54,
    "out.weight": 27,
    "conv.bias": 6,
    "mix.bias": 9,
    "out.bias": 3,
}
RATES = {10: 0.1, 20: 0.05}


@pytest.fixture
def run(make_run) -> Path:
    return make_run(definition=DEFINITION)


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> list[tuple[float, dict, dict]]:
    """Per checkpoint its rate and the (training, query) gradients."""
    run = build_run(tmp_path_factory.mktemp("reference") / "run", DEFINITION)
    space = definition_of(run)
    model, found = space["model"](), []
    for step, rate in RATES.items():
        load(model, run, step)
        singles = [
            [torch.utils.data.default_collate([item]) for item in space[of]()]
            for of in ("train_data", "query_data")
        ]
        found.append((rate, *(reference.gradients(model, space["loss"], some) for some in singles)))
    return found


def by_hand(gradients, kind: str, numbers: int, seed: int = 0) -> torch.Tensor:
    """(Q, N) scores from explicit projection matrices."""
    return sum(
        rate
        * reference.flat(by_matrix(query, kind, numbers, seed))
        @ reference.flat(by_matrix(trained, kind, numbers, seed)).T
        for rate, trained, query in gradients
    )


def table(result, queries: int = 6, count: int = 30) -> torch.Tensor:
    """(Q, N) from a table of `--top all`."""
    assert result.code == 0, result.err
    found = torch.full((queries, count), torch.nan, dtype=torch.float64)
    for row in result.rows:
        found[int(row["query"]), int(row["train"])] = float(row["score"])
    assert not found.isnan().any()
    return found


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-9) -> None:
    assert (found - wanted).abs().max() < tolerance * wanted.abs().max()


# ---------------------------------------------------------------- scores
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_explicit_matrices(kind, run, gradients, influence):
    flags = ("--project", "16", "--projection", kind, "--seed", "3", "--top", "all")
    kept = influence("score", run, *flags)
    close(table(kept), by_hand(gradients, kind, 16, 3))
    close(table(influence("score", run, *flags, "--cache", "none")), table(kept), 1e-12)
    assert kept.out == influence("score", run, *flags).out  # read from disk


def test_without_a_kind_and_a_seed_it_is_the_tensor_sketch_of_seed_0(run, gradients, influence):
    close(
        table(influence("score", run, "--project", "20", "--top", "all")),
        by_hand(gradients, "tensor-sketch", 20),
    )


def test_gradients_of_one_layer_have_the_maps_that_they_have_among_all(run, influence):
    """A map depends on its parameter alone, so that columns can be cached and asked for apart."""
    influence("cache", run, "--project", "16")
    flags = ("--project", "16", "--layers", "mix", "--top", "all")
    alone = influence("score", run, *flags, "--cache", run / "elsewhere")
    close(table(influence("score", run, *flags)), table(alone), 1e-12)


def test_cosines_divide_by_exact_norms(run, gradients, influence):
    found = table(
        influence("score", run, "--method", "grad-cos", "--project", "16", "--top", "all")
    )
    _, trained, query = gradients[-1]
    products = (
        reference.flat(by_matrix(query, "tensor-sketch", 16))
        @ reference.flat(by_matrix(trained, "tensor-sketch", 16)).T
    )
    close(
        found,
        products
        / torch.outer(reference.flat(query).norm(dim=1), reference.flat(trained).norm(dim=1)),
    )


def test_self_influence_is_exact(run, gradients, influence):
    exact = influence("self", run, "--top", "all")
    assert influence("self", run, "--project", "4", "--top", "all").out == exact.out
    influence("score", run, "--project", "9", "--projection", "khatri-rao")
    beside = influence(
        "self", run, "--project", "9", "--projection", "khatri-rao", "--top", "all"
    )  # norms beside projected gradients
    wanted = sum(rate * reference.flat(trained).square().sum(1) for rate, trained, _ in gradients)
    for result in (exact, beside):
        found = {int(row["train"]): float(row["score"]) for row in result.rows}
        close(torch.tensor([found[i] for i in range(30)], dtype=torch.float64), wanted, 1e-12)


# ---------------------------------------------------------------- stores
def test_int8_scores_are_those_of_127ths_and_within_half_a_step_of_each_number(
    run, gradients, influence
):
    """A stored number is a whole number of 127ths of its row's largest, so off by at most a 254th of that: a product of rows g and q of K
    numbers by at most |g| e(q) + |q| e(g) + e(g) e(q), e = sqrt(K) max / 254."""
    found = table(influence("score", run, "--project", "16", "--store", "int8", "--top", "all"))
    wanted, allowed = (
        torch.zeros(6, 30, dtype=torch.float64),
        torch.zeros(6, 30, dtype=torch.float64),
    )
    for rate, *both in gradients:
        trained, query = (by_matrix(part, "tensor-sketch", 16) for part in both)
        for name, g in trained.items():
            wanted += rate * in_127ths(query[name]) @ in_127ths(g).T
            sizes = [
                (part.norm(dim=1), part.abs().amax(1) * part.shape[1] ** 0.5 / 254)
                for part in (query[name], g)
            ]
            (q_norm, q_off), (g_norm, g_off) = sizes
            allowed += rate * (
                torch.outer(q_off, g_norm) + torch.outer(q_norm, g_off) + torch.outer(q_off, g_off)
            )
    close(found, wanted, 1e-5)  # products in float32
    off = (found - by_hand(gradients, "tensor-sketch", 16)).abs()
    assert (off <= allowed + 1e-6 * allowed.max()).all()
    assert off.max() > 1e-4 * found.abs().max()


def in_127ths(rows: torch.Tensor) -> torch.Tensor:
    scale = (rows.abs().amax(1, keepdim=True) / 127).float().double()
    return (rows / scale).round() * scale


@pytest.mark.parametrize("store", ["int8", "float16", "bfloat16"])
@pytest.mark.parametrize("projection", [("--project", "16"), ()], ids=["projected", "exact"])
def test_gradients_of_a_trillionth_survive(store, projection, make_run, influence):
    """A loss of 2^-40 times the size has scores of 2^-80 times the size, whatever the store; without a scale float16 would have zeros."""
    small = replaced(DEFINITION, ("return F.cross_entropy", "return 2.0**-40 * F.cross_entropy"))
    flags = ("--store", store, *projection, "--top", "all")
    usual, tiny = (
        table(influence("score", make_run(name, text), *flags))
        for name, text in (("usual", DEFINITION), ("tiny", small))
    )
    assert tiny.abs().max() < 1e-22
    close(tiny * 2.0**80, usual, 1e-6)


# ---------------------------------------------------------------- the cache
def computed(influence, monkeypatch, *arguments: object) -> int:
    """How many units of training examples a command writes."""
    written = []
    write = Store.write_content
    with monkeypatch.context() as patch:
        patch.setattr(
            Store,
            "write_content",
            lambda self, unit, *rest, **more: (
                written.append(unit.path),
                write(self, unit, *rest, **more),
            ),
        )
        assert influence(*arguments).code == 0
    return sum("train" in path.parts for path in written)


def test_another_map_is_another_cache_and_the_same_is_not_computed_again(
    run, influence, monkeypatch
):
    ways = {
        "float64-stored-float64-exact": (),
        "float64-stored-float64-tensor-sketch-16-seed-0": ("--project", "16"),
        "float64-stored-float64-tensor-sketch-25-seed-0": ("--project", "25"),
        "float64-stored-float64-tensor-sketch-16-seed-1": ("--project", "16", "--seed", "1"),
        "float64-stored-float64-sparse-16-seed-0": ("--project", "16", "--projection", "sparse"),
        "float64-stored-int8-tensor-sketch-16-seed-0": ("--project", "16", "--store", "int8"),
    }
    tables = set()
    for number, flags in enumerate(ways.values(), start=1):
        assert (
            computed(influence, monkeypatch, "score", run, *flags) == 2
        )  # a unit for each checkpoint
        assert sorted(path.name for path in (run / ".influence").glob("*-stored-*")) == sorted(
            list(ways)[:number]
        )
    for flags in ways.values():
        assert computed(influence, monkeypatch, "score", run, *flags) == 0
        tables.add(influence("score", run, *flags).out)
    assert len(tables) == len(ways)
    assert (
        computed(
            influence,
            monkeypatch,
            "score",
            run,
            "--project",
            "16",
            "--seed",
            "0",
            "--projection",
            "tensor-sketch",
        )
        == 0
    )


def test_a_projected_cache_is_small_and_passes_its_check(run, influence):
    influence("cache", run, "--project", "4", "--store", "int8")
    influence("cache", run)
    sizes = {"train": {}, "query": {}}
    for path in (run / ".influence").rglob("0*.safetensors"):
        split = sizes["train" if "train" in path.parts else "query"]
        kind = "exact" if "exact" in str(path) else "projected"
        split[kind] = split.get(kind, 0) + path.stat().st_size
    assert sizes["train"]["projected"] < 0.6 * sizes["train"]["exact"]
    result = influence("check", run, "--project", "4", "--store", "int8")
    assert result.code == 0, result.err
    assert (
        sum(row["check"] == "cache" and row["result"] == "ok" for row in result.rows)
        == 2 * 2 * 2 + 3
    )


SLOW = replaced(
    DEFINITION,
    ("def loss(model, batch):", "import time\ndef loss(model, batch):\n    time.sleep(0.005)"),
    ("examples(0, 30)", "examples(0, 40)"),
)


def make_units_small() -> None:
    memory_budget.UNIT_EXAMPLES = 4


def start(run: Path) -> Job:
    flags = ("--batch-size", "1", "--project", "16", "--store", "int8", "--quiet")
    return Job("score", run, *flags, place=run.parent, name=run.name, prepare=make_units_small)


def files(run: Path) -> dict[str, str]:
    found = sorted((run / ".influence").rglob("0*.safetensors"))
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found
    }


def test_a_killed_run_goes_on_to_the_same_bytes(make_run):
    undisturbed, killed = make_run("undisturbed", SLOW), make_run("killed", SLOW)
    expected = start(undisturbed).wait().out
    assert expected
    job = start(killed)
    limit = time.monotonic() + 60
    while len(files(killed)) < 8 and job.poll() is None and time.monotonic() < limit:
        time.sleep(0.005)
    job.kill(signal.SIGKILL)
    ended = job.wait()
    assert (ended.code, ended.out) == (-signal.SIGKILL, "")
    kept, whole = files(killed), files(undisturbed)
    assert 8 <= len(kept) < len(whole), "work was lost, or the process was too fast to be stopped"
    assert start(killed).wait().out == expected
    assert files(killed) == whole
    assert kept.items() <= whole.items()


# ---------------------------------------------------------------- dve
TRAININGS = {
    "plain": {},
    "momentum, weight decay": {"options": {"momentum": 0.9, "weight_decay": 0.05}, "rate": 0.05},
    "nesterov": {"options": {"momentum": 0.8, "nesterov": True}, "rate": 0.05},
}


def left_out(
    run: Path, numbers: int, kind: str = "tensor-sketch", curved: bool = True, **options: float
) -> torch.Tensor:
    """(Q, N): the recursion over whole Jacobians, on projected gradients in place of the gradients; every step saved."""
    space = definition_of(run)
    model, data, queries = space["model"](), space["train_data"](), space["query_data"]()

    def kept(step: int, source, ids) -> torch.Tensor:
        load(model, run, step)
        singles = [torch.utils.data.default_collate([source[i]]) for i in ids]
        return reference.flat(
            by_matrix(reference.gradients(model, space["loss"], singles), kind, numbers)
        )

    lines = [json.loads(text) for text in (run / "trajectory.jsonl").read_text().splitlines()[1:]]
    passed = []
    for line in lines:
        G = kept(line["step"], data, line["examples"])
        passed.append(
            (G, G, torch.full((len(G),), 1 / len(G), dtype=torch.float64), line["lr"], 1.0)
        )
    found = reference.left_out(
        passed,
        kept(lines[-1]["step"] + 1, queries, range(len(queries))),
        options.get("momentum", 0.0),
        options.get("weight_decay", 0.0),
        bool(options.get("nesterov")),
        curved,
    )
    total = torch.zeros(len(queries), len(data), dtype=torch.float64)
    for line, scores in zip(lines, found, strict=True):
        total.index_add_(1, torch.tensor(line["examples"]), scores.T)
    return total


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_dve_goes_back_over_projected_gradients_in_both_forms(training, tmp_path, influence):
    run = train(tmp_path / "run", **training)
    flags = ("--method", "dve", "--project", "4", "--top", "all")
    query, embedding = (
        influence("score", run, *flags, "--form", form) for form in ("query", "embedding")
    )
    wanted = left_out(run, 4, **training.get("options", {}))
    seen = wanted.abs().sum(0) > 0  # examples that no step took have no rows
    for result in (query, embedding):
        found = torch.zeros_like(wanted)
        for row in result.rows:
            found[int(row["query"]), int(row["train"])] = float(row["score"])
        assert len(result.rows) >= 5 * int(seen.sum())
        close(found, wanted)
        assert "the curvature of projected gradients is biased" in result.err


def test_dve_without_curvature_is_not_biased_and_says_nothing_of_it(tmp_path, influence):
    run = train(tmp_path / "run")
    result = influence(
        "score",
        run,
        "--method",
        "dve",
        "--project",
        "4",
        "--projection",
        "kronecker",
        "--curvature",
        "none",
        "--top",
        "all",
    )
    found = torch.zeros(5, 24, dtype=torch.float64)
    for row in result.rows:
        found[int(row["query"]), int(row["train"])] = float(row["score"])
    close(found, left_out(run, 4, "kronecker", curved=False))
    assert "biased" not in result.err


def test_dve_with_replay_projects_what_it_takes_on_the_way(tmp_path, influence):
    run = train(tmp_path / "run")
    flags = ("--method", "dve", "--project", "4", "--top", "all")
    result = influence("score", run, *flags, "--replay", "--steps", "0,12")
    found = torch.zeros(5, 24, dtype=torch.float64)
    for row in result.rows:
        found[int(row["query"]), int(row["train"])] = float(row["score"])
    close(found, left_out(run, 4), 1e-7)


# ---------------------------------------------------------------- refused
REFUSED = {
    "--method unroll --project 8": (
        "--project does not apply to --method unroll",
        "runs the model itself",
    ),
    "--method tracin-we --project 8": (
        "--project does not apply to --method tracin-we",
        "single words",
    ),
    "--projection sparse": ("--projection sparse without --project", "--project K"),
    "--project 0": ("--project 0", "a number from 1"),
    "--project -4": ("--project -4", "a number from 1"),
    "--project 8 --projection gaussian": (
        "--projection gaussian: unknown",
        "tensor-sketch, sparse, khatri-rao, kronecker",
    ),
    "--project 20 --projection kronecker": (
        "--project 20 with --projection kronecker",
        "a square, such as 16 or 25",
    ),
    "--project 8 --seed -1": ("--seed -1", "a number from 0"),
    "--store int8 --cache none": ("--cache none stores nothing",),
    "--store int4": ("--store int4: unknown", "int8"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refusals(flags, run, influence):
    refused(influence("score", run, *flags.split()), 2, *REFUSED[flags])
    assert not (run / ".influence").exists()


@pytest.mark.parametrize("command", ["self", "cache", "check", "inspect"])
@pytest.mark.parametrize(
    "flags",
    [
        "--project 0",
        "--projection sparse",
        "--project 20 --projection kronecker",
        "--project 8 --seed -1",
    ],
)
def test_every_command_refuses_alike(flags, command, run, influence):
    refused(influence(command, run, *flags.split()), 2, *REFUSED[flags])


@pytest.mark.parametrize("value", ["0", "1", "1.5", "-0.5", "nan"])
@pytest.mark.parametrize("command", ["check", "inspect"])
def test_a_target_is_a_correlation(command, value, run, influence):
    refused(
        influence(command, run, "--target-correlation", value),
        2,
        f"--target-correlation {float(value)}",
        "between 0 and 1",
    )


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW], ids=["adam", "adamw"])
def test_dve_under_adam_is_refused(kind, tmp_path, influence):
    run = train(tmp_path / "run", kind=kind, rate=0.01)
    for flags in (("--replay",), ("--replay", "--curvature", "none")):
        refused(
            influence("score", run, "--method", "dve", "--project", "4", *flags),
            2,
            "--project",
            kind.__name__.lower(),
            "scale each number of a gradient",
        )
    assert influence("score", run, "--project", "4", "--lr", "1").code == 0


# ---------------------------------------------------------------- what is said of it
def smallest(gradients, target: float) -> tuple[int, list[float]]:
    """The first K of 16, 32, 64, ... whose correlations both reach the target, and what each tried reached."""
    pairs = [(reference.flat(query), reference.flat(trained)) for _, trained, query in gradients]
    exact, reached = sum(query @ trained.T for query, trained in pairs), []
    for numbers in (16, 32, 64, 128):
        kept = [
            [reference.flat(by_matrix(part, "tensor-sketch", numbers)) for part in (query, trained)]
            for _, trained, query in gradients
        ]
        found = sum(query @ trained.T for query, trained in kept)
        rows = list(zip(found.numpy(), exact.numpy(), strict=True))
        ranked = [[np.argsort(np.argsort(row)) for row in pair] for pair in rows]
        reached.append(
            min(
                float(np.mean([np.corrcoef(*pair)[0, 1] for pair in some]))
                for some in (rows, ranked)
            )
        )
        if reached[-1] >= target:
            return numbers, reached
    raise AssertionError(reached)


def test_check_fails_where_the_target_is_missed_and_names_the_smallest_size(
    run, gradients, influence
):
    wanted, reached = smallest(gradients, 0.99)
    assert wanted > 16
    result = influence("check", run, "--project", "16", "--target-correlation", "0.99")
    assert result.code == 1
    rows = [row for row in result.rows if row["check"] in ("fidelity", "target")]
    assert [row["subject"] for row in rows] == [
        "tensor-sketch 16",
        "tensor-sketch 16",
        f"tensor-sketch {wanted}: the first that reaches it",
    ]
    assert [row["result"] for row in rows] == ["ok", "FAILED", "ok"]
    assert float(rows[1]["error"]) == pytest.approx(1 - reached[0], abs=1e-9)
    assert float(rows[2]["error"]) == pytest.approx(1 - reached[-1], abs=1e-9)
    assert {row["result"] for row in result.rows if row["check"] not in ("fidelity", "target")} == {
        "ok"
    }
    assert "target of pairs examples: tensor-sketch 16" in result.err
    assert "the target needs a larger --project K" in result.err
    assert (
        influence("check", run, "--project", str(wanted), "--target-correlation", "0.99").code == 0
    )


def test_a_target_without_a_projection_looks_for_one(run, gradients, influence):
    result = influence("check", run, "--target-correlation", "0.99")
    assert result.code == 0, result.err
    assert [row["subject"] for row in result.rows if row["check"] in ("fidelity", "target")] == [
        f"tensor-sketch {smallest(gradients, 0.99)[0]}: the first that reaches it"
    ]


def test_inspect_shows_what_a_projection_does(run, gradients, influence, monkeypatch):
    monkeypatch.setattr("influence_cli.diagnostics.cost_estimate.SECONDS", 0.01)
    result = influence("inspect", run, "--project", "16", "--cache", "none")
    assert result.code == 0, result.err
    lines = [line.split() for line in result.out.splitlines()]
    at = next(i for i, line in enumerate(lines) if line[:2] == ["scores", "of"])
    assert "relative error  expected below  Pearson  Spearman  top-10 overlap" in " ".join(
        result.out.splitlines()[at + 1].split("   ")
    )
    name, numbers, kept, error, allowed, linear, ranked, overlap = lines[at + 2]
    assert (name, numbers, kept) == (
        "tensor-sketch",
        "16",
        str(sum(min(16, size) for size in SIZES.values())),
    )
    pairs = [(query, trained) for _, trained, query in gradients]
    exact = sum(reference.flat(query) @ reference.flat(trained).T for query, trained in pairs)
    found = sum(
        reference.flat(by_matrix(query, "tensor-sketch", 16))
        @ reference.flat(by_matrix(trained, "tensor-sketch", 16)).T
        for query, trained in pairs
    )
    assert float(error) == pytest.approx(float((found - exact).norm() / exact.norm()), abs=6e-5)
    assert min(float(linear), float(ranked)) == pytest.approx(
        smallest(gradients, 0.99)[1][0], abs=6e-5
    )
    assert float(error) < float(allowed)
    assert 0 <= float(overlap) <= 1
    shown = {line[0]: line for line in lines if line and line[0] in SIZES}
    assert shown["words.weight"][-3:] == ["projected", "128", "B"]
    assert "scores of a sample of pairs" not in influence("inspect", run, "--cache", "none").out
