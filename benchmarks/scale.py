"""A billion rows, planned and not computed: seconds and memory of the plan, of finding what is there, and of choosing a rank's share.

python benchmarks/scale.py [--rows 1000000000] [--project 64]

The run has a dataset that only knows its length. fresh: nothing is cached. full: every unit's name is there, of empty files in a temporary
folder (--files, of at most that many), as a rerun finds them. shards: the ids of one of 1,000 jobs, and their plan. Then what the constants
of this machine, measured here, say about disk and time. Memory is what each step adds to the process.
"""

import argparse
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import machine, opened, plan_of
from stream import LAYERS, make_run

from influence_cli.parallel.shards import Shard


def measured(name: str, work: Callable[[], object]) -> object:
    """Runs it, and prints its seconds and how far it raised the process's memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = work()
    seconds, after = (
        time.perf_counter() - started,
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )
    print(f"| {name} | {seconds:.3f} s | {(after - before) / 1e3:,.0f} MB | {found} |", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000_000)
    parser.add_argument("--project", type=int, default=64)
    parser.add_argument("--files", type=int, default=250_000)
    flags = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="influence-scale-", dir=os.environ.get("TMPDIR")))
    print(machine())
    try:
        make_run(folder / "run", flags.rows)
        run = opened(folder / "run", str(folder / "cache"), project=flags.project)
        gradients, names, checkpoint = run.gradients, list(run.columns), run.checkpoints[0]
        everything = range(flags.rows)
        gradients.budget.sizes("train", names)  # probed as `inspect` does
        unit = gradients.budget.unit_size("train", names, "values")
        print(
            f"{flags.rows:,} rows of {LAYERS} x {flags.project} numbers at one checkpoint, units of {unit}"
        )
        print("| | time | memory | found |\n|---|---|---|---|")

        def plan(ids=everything) -> str:
            jobs = plan_of(gradients, checkpoint, ids, names)
            return f"{len(jobs):,} units of {jobs.examples:,} rows, the last {jobs[len(jobs) - 1].unit.path.name}"

        measured("plan, fresh", plan)
        measured("plan of shard 500/1000", lambda: plan(Shard(500, 1000).of(everything)))
        jobs = plan_of(gradients, checkpoint, everything, names)
        measured(
            "every 1,000th unit named",
            lambda: sum(1 for number in range(0, len(jobs), 1000) if jobs[number].unit),
        )
        first = jobs[0].unit.path
        first.parent.mkdir(parents=True)
        head = {"columns": names, "level": "values", "definition": run.run.definition.digest}
        from influence_cli.storage.atomic import write_json

        write_json(first.parent / "columns.json", head)
        size = gradients.budget.unit_size("train", names, "values")
        count = min(flags.files, len(jobs))
        for number in range(count):
            os.close(
                os.open(
                    first.parent
                    / f"{number * size:012d}-{min(number * size + size, flags.rows):012d}.safetensors",
                    os.O_CREAT,
                )
            )
        gradients.cache.forget_indexes()
        measured(
            f"what is there, {count:,} files",
            lambda: f"{len(gradients.cache.index('train', checkpoint).units):,} units",
        )
        measured(
            "plan, that much there",
            lambda: f"{len(plan_of(gradients, checkpoint, everything, names)):,} units missing",
        )
        stored, _ = gradients.budget.needs("train", names, flags.rows)
        records = sum(path.stat().st_size for path in (folder / "cache").rglob("*.json"))
        print(
            f"\non disk {stored / 1e12:.2f} TB ({stored / flags.rows:,.0f} bytes a row) in {len(jobs):,} files; records {records:,} bytes"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
