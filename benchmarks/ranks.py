"""Do two ranks capture twice as much? Each process on one core, with one thread.

python benchmarks/ranks.py [w1 w2 w3] [--train N] [--repeats 3]

The gradients of every training example at every checkpoint, by one process and by two that torchrun started, in turns. on disk: kept and
synced, unit by unit, as `influence cache` does. discarded: captured in blocks of 256 and dropped, as with --cache none, so that the one
disk does not count. Timed within the work, from runs that are opened and probed to the last unit of the last rank: process start is
left out.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

from common import Opened, capture, interleaved, machine, opened, workload

from influence_cli.cache.id_blocks import cut_by_grid


def work(run: Path, cache: str) -> None:
    """In a process of its own, on the core of its local number; rank 0 prints the seconds."""
    cores = sorted(os.sched_getaffinity(0))
    live = opened(run, cache)
    os.sched_setaffinity(0, {cores[live.ranks.place.local]})
    live.gradients.budget.sizes("train", list(live.columns))  # probes
    live.ranks.wait()
    seconds = discard(live) if cache == "none" else capture(live, live.gradients)
    if live.ranks.rank == 0:
        print(seconds)
    live.ranks.close()


def discard(live: Opened) -> float:
    started = time.perf_counter()
    for checkpoint in live.checkpoints:
        for block in list(cut_by_grid(range(len(live.run.train)), 256))[
            live.ranks.rank :: live.ranks.count
        ]:
            for _ in live.gradients.read("train", checkpoint, list(live.columns), block):
                pass
    live.ranks.wait()
    return time.perf_counter() - started


def timed(run: Path, ranks: int, cache: str) -> float:
    """Seconds that so many ranks say they took."""
    shutil.rmtree(run / ".influence", ignore_errors=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        if ranks > 1
        else []
    )
    command = [sys.executable, *launch, __file__, "--work", str(run), cache]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w3"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int, default=1024)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.work:
        work(Path(flags.work[0]), flags.work[1])
        return
    print(machine())
    print("| | examples x checkpoints | | 1 rank | 2 ranks | ratio |\n|---|---|---|---|---|---|")
    for name in flags.workloads:
        with workload(name, flags.train) as (asked, run):
            pairs = len(asked.xtr) * asked.n_ckpt
            for way, cache in (("on disk", str(run / ".influence")), ("discarded", "none")):
                jobs = {
                    str(ranks): lambda ranks=ranks, cache=cache: timed(run, ranks, cache)
                    for ranks in (1, 2)
                }
                best = interleaved(jobs, flags.repeats)
                one, two = (pairs / best[ranks] for ranks in ("1", "2"))
                print(
                    f"| {name} | {len(asked.xtr):,} x {asked.n_ckpt} | {way} | {one:,.0f}/s | {two:,.0f}/s | {two / one:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
