"""Scoring more rows than memory holds: N rows of projected numbers on disk against what the disk and the processor can do.

python benchmarks/stream.py [--rows 2000000] [--queries 1 10 100 400] [--store float32] [--repeats 2]

A run of 16 small layers whose cache is filled with random rows of 64 numbers a layer (1,024 a row) by the store itself; timed is scoring
from an opened run to its ranked top 10. disk: the same files read in the same way and nothing else. GEMM: as many products of 4,096 x
1,024 by 1,024 x queries in memory. Cold: the files are dropped from the page cache before. All in turns in this process.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, opened, plan_of, score
from safetensors.torch import save_file

from influence_cli.api.opening import Opened
from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.gradients.forms import Projected
from influence_cli.gradients.row_products import products
from influence_cli.storage.safetensors_io import TensorFile, allocate_pages

LAYERS, NUMBERS = 16, 64
DEFINITION = f"""
import torch
from torch import nn

class Examples:
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, i): return torch.tensor([float(i % 977), float(i % 31)])

def model(): return nn.Sequential(nn.Linear(2, 32, bias=False), *[nn.Linear(32, 32, bias=False) for _ in range({LAYERS - 1})])
def train_data(): return Examples(ROWS)
def query_data(): return Examples(1000)
def loss(model, batch): return model(batch).square().mean(1)
"""


def make_run(folder: Path, rows: int) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(DEFINITION.replace("ROWS", str(rows)))
    space: dict = {}
    exec(DEFINITION.replace("ROWS", str(rows)), space)
    save_file(
        space["model"]().state_dict(),
        folder / "checkpoints" / "step-1.safetensors",
        {"learning_rate": "0.1"},
    )


def fill(run: Opened) -> float:
    """Seconds to write random rows as the units that `influence cache` would write."""
    gradients, names = run.gradients, list(run.columns)
    assert gradients.cache is not None
    started, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    jobs = plan_of(gradients, run.checkpoints[0], range(len(run.run.train)), names)
    values = torch.randn(4096 + 509, LAYERS * NUMBERS, generator=generator)
    with gradients.cache.store.writer(gradients.settings.storage_dtype, 1 << 40) as writer:
        for number, job in enumerate(jobs):
            size = len(job.ids)
            some = values[number % 509 :][:size]
            forms = {
                name: Projected(run.columns[name].shape, some[:, k * NUMBERS : (k + 1) * NUMBERS])
                for k, name in enumerate(names)
            }
            zeros = torch.ones(size, dtype=torch.float64)
            writer.write(
                job.unit,
                GradientRows(
                    job.ids,
                    zeros,
                    run.run.train.digests(job.ids),
                    dict.fromkeys(names, zeros),
                    forms,
                ),
            )
    return time.perf_counter() - started


def read_all(paths: list[Path]) -> float:
    started = time.perf_counter()
    for path in paths:
        with TensorFile(path) as file:
            block = allocate_pages(file.size)
            file._fill(block, 0, file.size)
    return time.perf_counter() - started


def drop(paths: list[Path]) -> None:
    """Out of the page cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def gemm(rows: int, queries: int) -> float:
    ours, theirs = torch.randn(4096, LAYERS * NUMBERS), torch.randn(queries, LAYERS * NUMBERS)
    products(ours, theirs)
    started = time.perf_counter()
    count = max(1, min(100, rows // 4096))
    for _ in range(count):
        products(ours, theirs)
    return (time.perf_counter() - started) / count * rows / 4096


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--queries", type=int, nargs="*", default=[1, 10, 100, 400])
    parser.add_argument("--store", default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="influence-stream-", dir=os.environ.get("TMPDIR")))
    print(machine())
    try:
        make_run(folder / "run", flags.rows)
        settings = {"project": NUMBERS, "store": flags.store}
        run = opened(folder / "run", str(folder / "cache"), **settings)
        run.gradients.ensure("query", run.checkpoints, list(run.columns), range(max(flags.queries)))
        seconds = fill(run)
        paths = sorted((folder / "cache").glob("*/*/train/*/*.safetensors"))
        size = sum(path.stat().st_size for path in paths)
        print(
            f"{flags.rows:,} rows of {LAYERS * NUMBERS:,} {flags.store} numbers, {size / 1e9:.1f} GB in {len(paths):,} files, written in "
            f"{seconds:.0f} s"
        )
        print(
            "| queries | page cache | disk alone | GEMM alone | score | of the slower | MB at most |\n|---|---|---|---|---|---|---|"
        )
        for queries in flags.queries:
            for state in ("cold", "warm"):
                best = {"disk": np.inf, "gemm": np.inf, "score": np.inf}
                for _ in range(flags.repeats):
                    for name in best:
                        if state == "cold":
                            drop(paths)
                        elif name == "score":
                            read_all(paths)
                        again = opened(folder / "run", str(folder / "cache"), **settings)
                        work = {
                            "disk": lambda: read_all(paths),
                            "gemm": lambda queries=queries: gemm(flags.rows, queries),
                            "score": lambda again=again, queries=queries: score(
                                again, again.gradients, queries
                            ),
                        }[name]
                        best[name] = min(best[name], work())
                part = max(best["disk"], best["gemm"]) / best["score"]
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                times = " | ".join(f"{seconds:.2f} s" for seconds in best.values())
                print(f"| {queries} | {state} | {times} | {part:.0%} | {peak:,.0f} |", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
