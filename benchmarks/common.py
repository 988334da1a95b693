"""What the benchmarks share: workloads as opened runs, our jobs on them, the floor, and how ratios are printed."""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from workloads import Work, floor_seconds, write_run

from influence_cli.api.opening import Opened
from influence_cli.api.requests import score_request
from influence_cli.api.specs import ids as parse_ids
from influence_cli.cache.id_blocks import Ids
from influence_cli.cli.opening import open_shared
from influence_cli.cli.options import Shared
from influence_cli.extraction.fill import FillRequest
from influence_cli.extraction.source import GradientSource
from influence_cli.extraction.work_plan import WorkPlan
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import TopRanking
from influence_cli.run.checkpoints import Checkpoint

BATCHES = {
    "w1": (256, 1000),
    "w2": (32, 64),
    "w3": (32, 64, 250),
    "w4": (8, 16),
}  # among them the floor's best


@contextmanager
def workload(name: str, train: int | None = None, queries: int | None = None):
    """The workload, and its run folder in a temporary place."""
    folder = Path(tempfile.mkdtemp(prefix=f"influence-{name}-", dir=os.environ.get("TMPDIR")))
    try:
        write_run(name, folder / "run", train)
        yield Work(name, train, queries), folder / "run"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def opened(run: Path, cache: str, **flags: object) -> Opened:
    """The run as `influence score RUN --cache CACHE --quiet` opens it."""
    return open_shared(Shared(run=run, cache=cache, quiet=True, **flags))


def fresh(like: Opened, cache: str | None) -> GradientSource:
    """Gradients that hold nothing in memory: of the same opened run, with the same or no cache."""
    old = like.gradients
    store = old.cache.store if cache and old.cache else None
    return GradientSource(like.run, old.settings, store, old.device)


def plan_of(
    gradients: GradientSource, checkpoint: Checkpoint, ids: Ids, columns: Sequence[str]
) -> WorkPlan:
    """The units that the cache lacks of these training examples at a checkpoint."""
    assert gradients.filler is not None
    return gradients.filler.plan(FillRequest("train", [(checkpoint, ids)], columns))


def score(
    like: Opened,
    gradients: GradientSource,
    queries: int | None = None,
    method: str = "tracin",
    embedding: str | None = None,
) -> float:
    """Seconds from an opened run to the ranked top 10 of every query: capture, cache, products, ranking. `embedding`: for tracin-we."""
    chosen = METHODS[method]
    spec = f"0:{queries}" if queries else None
    request = score_request(
        like,
        chosen,
        chosen.options(embedding=embedding) if embedding else chosen.options(),
        train=range(len(like.run.train)),
        queries=parse_ids("--queries", spec, len(like.run.query), "query", sys.stdin),
    )
    started = time.perf_counter()
    for answer in chosen.score(
        gradients, request, lambda width, parts: TopRanking(width, parts, 10)
    ):
        for query in range(answer.ranking.queries):
            list(answer.ranking.entries(query))
    return time.perf_counter() - started


def capture(like: Opened, gradients: GradientSource, level: str = "values") -> float:
    """Seconds to take (and, with a cache, keep) the gradients of every training example at every checkpoint."""
    columns, ids = list(like.columns), range(len(like.run.train))
    started = time.perf_counter()
    if gradients.cache:
        gradients.ensure("train", like.checkpoints, columns, ids, level)
    else:
        for checkpoint in like.checkpoints:
            for _ in gradients.read("train", checkpoint, columns, ids, level):
                pass
    return time.perf_counter() - started


def interleaved(jobs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The least seconds of each job, taken in turns."""
    best = dict.fromkeys(jobs, float("inf"))
    for _ in range(repeats):
        for name, job in jobs.items():
            best[name] = min(best[name], job())
    return best


def floor_of(work: Work) -> Callable[[], float]:
    return lambda: min(floor_seconds(work, b, 1) for b in BATCHES[work.name])


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        platform.machine(),
    )
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"


def _cpuinfo() -> Sequence[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else ()


def peak_mb(command: Sequence[str]) -> tuple[float, float]:
    """(seconds, peak MB) of a whole process."""
    script = (
        "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", script, *command], capture_output=True, text=True, check=True
    )
    return time.perf_counter() - started, int(done.stdout.split()[-1]) / (
        1024 if sys.platform != "darwin" else 1024**2
    )
