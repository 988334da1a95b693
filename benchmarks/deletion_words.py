"""Case deletion by real retraining on sample_runs/words: does the query suffer without its proponents, and gain without its opponents?

python benchmarks/deletion_words.py [--queries 20] [--seeds 3]

f(q) = -loss of a query with its right label. DEL+(k) = mean over seeds of f(q; retrained without its top k proponents) - f(q; full),
below 0 where proponents helped; DEL- the same without opponents, above 0 where they harmed; AUC = mean over k. A seed is an
initialisation and an order of batches, the same for every method; what is deleted is left out of its batches, whose mean is over the rest.
Queries: chosen at random among those that the run's last checkpoint takes rightly, never the planted one. Brackets: 95 % bootstrap
intervals over queries. The rankings are the command line's.
"""

import argparse
import csv
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call, grad, stack_module_state, vmap

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "sample_runs" / "words"))

import definition
import train
from common import machine

RUN = definition.HERE
GRID = (5, 10, 20, 40)
KINDS = ("proponent", "opponent")
METHODS = {
    "tracin-we": ["--method", "tracin-we"],
    "tracin, last layer": ["--method", "tracin", "--layers", "output"],
    "tracin, all layers": ["--method", "tracin"],
}
AT_ONCE = 32  # models trained together; more fall out of the processor's caches


# ---------------------------------------------------------------- what is deleted
def ranked(flags: list[str], queries: list[int], cache: str) -> dict[tuple[int, str], list[int]]:
    """(query, kind) -> training examples, the strongest first."""
    asked = [
        "--queries",
        ",".join(map(str, queries)),
        "--top",
        str(max(GRID)),
        "--format",
        "csv",
        "--cache",
        cache,
        "--quiet",
    ]
    command = [sys.executable, "-m", "influence_cli", "score", str(RUN), *flags, *asked]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[tuple[int, str], list[int]] = {
        (query, kind): [] for query in queries for kind in KINDS
    }
    for row in csv.DictReader(io.StringIO(done.stdout)):
        found[int(row["query"]), row["kind"]].append(int(row["train"]))
    return found


def at_random(queries: list[int], seed: int) -> dict[tuple[int, str], list[int]]:
    rng = np.random.default_rng(seed)
    return {
        (query, kind): rng.permutation(train.TRAIN)[: max(GRID)].tolist()
        for query in queries
        for kind in KINDS
    }


def right_queries(number: int) -> list[int]:
    """Queries that the last checkpoint takes rightly, without the planted one, in a random order."""
    model = definition.model()
    model.load_state_dict(load_file(max((RUN / "checkpoints").iterdir())))
    texts, origins = definition.query_data().tensors
    right = model(texts).argmax(1) == origins
    right[json.loads((RUN / "planted.json").read_text())["query"]] = False
    return np.random.default_rng(0).permutation(right.nonzero().flatten().numpy())[:number].tolist()


# ---------------------------------------------------------------- retraining
def retrained(kept: Tensor, seed: int) -> dict[str, Tensor]:
    """Parameters (M, ...) of one model for each row of `kept` (M, N), trained as train.py does on the examples it keeps."""
    model, (texts, origins) = train.initial(seed), definition.train_data().tensors
    parameters, _ = stack_module_state([model] * len(kept))

    def mean_loss(
        parameters: dict[str, Tensor], batch: tuple[Tensor, Tensor], kept: Tensor
    ) -> Tensor:
        losses = definition.loss(lambda texts: functional_call(model, parameters, (texts,)), batch)
        return (losses * kept).sum() / kept.sum()

    gradients = vmap(grad(mean_loss), in_dims=(0, None, 0))
    parameters = {name: value.detach() for name, value in parameters.items()}
    for step, batch in enumerate(train.batches(seed)):
        found = gradients(parameters, (texts[batch], origins[batch]), kept[:, batch])
        for name, value in parameters.items():
            value -= train.rate(step) * found[name]
    return parameters


def qualities(kept: Tensor, seed: int) -> Tensor:
    """(M, Q) f of every query after each retraining."""
    model, batch = definition.model(), definition.query_data().tensors
    parts = []
    for some in kept.split(AT_ONCE):
        parameters = retrained(some, seed)
        with torch.no_grad():
            losses = vmap(
                lambda own: definition.loss(
                    lambda texts: functional_call(model, own, (texts,)), batch
                )
            )(parameters)
            parts.append(-losses)
    return torch.cat(parts)


def reproduced() -> float:
    """Largest difference between the run's last checkpoint and a retraining that deletes nothing, relative to the largest weight."""
    saved = load_file(max((RUN / "checkpoints").iterdir()))
    found = retrained(torch.ones(1, train.TRAIN), 0)
    return max(
        float((found[name][0] - saved[name]).abs().max() / saved[name].abs().max())
        for name in saved
    )


# ---------------------------------------------------------------- the table
def interval(values: np.ndarray) -> str:
    """Mean over queries, and its 95 % bootstrap interval."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (10_000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    queries = right_queries(flags.queries)
    with tempfile.TemporaryDirectory() as cache:
        rankings = {name: ranked(method, queries, cache) for name, method in METHODS.items()}
    rankings["random"] = at_random(queries, 0)
    shortest = min(len(ids) for found in rankings.values() for ids in found.values())
    print(
        f"{machine()}\n{len(queries)} queries, {flags.seeds} seeds; the shortest ranking has {shortest} of {max(GRID)} examples"
    )
    print(
        f"a retraining without deletions is the run's last checkpoint within {reproduced():.1e}\n",
        flush=True,
    )

    cases = [
        (name, kind, k, query)
        for name in rankings
        for kind in KINDS
        for k in GRID
        for query in queries
    ]
    kept = torch.ones(1 + len(cases), train.TRAIN)  # row 0: the full training set
    for row, (name, kind, k, query) in zip(kept[1:], cases, strict=True):
        row[rankings[name][query, kind][:k]] = 0
    changes = torch.zeros(len(cases))
    asked = torch.tensor([query for *_, query in cases])
    for seed in range(flags.seeds):
        found = qualities(kept, seed)
        changes += (found[1:] - found[:1])[torch.arange(len(cases)), asked] / flags.seeds
    table = changes.view(len(rankings), len(KINDS), len(GRID), len(queries)).double().numpy()

    print(f"| | {' | '.join(f'k = {k}' for k in GRID)} | AUC |\n|---|{'---|' * (len(GRID) + 1)}")
    for j, sign in enumerate(("DEL+", "DEL-")):
        for i, name in enumerate(rankings):
            cells = [interval(table[i, j, g]) for g in range(len(GRID))] + [
                interval(table[i, j].mean(0))
            ]
            print(f"| {sign} {name} | {' | '.join(cells)} |")
    print(
        f"\n{len(kept) * flags.seeds:,} retrainings, {time.perf_counter() - started:.0f} s in all"
    )


if __name__ == "__main__":
    main()
