"""Per-example gradients against the floor: what taking them costs, and keeping them.

python benchmarks/capture.py [w1 w2 w3 w4] [--repeats 3] [--train N] [--memory]

norms: squared norms and losses only, as `influence self` needs. discarded: every gradient, in the form in which it would be kept. on disk:
taken and kept, synced. Ratios are to the floor (one forward+backward over the training examples) times the number of checkpoints, taken in
turns in this process. --memory: peak memory of `influence cache` as a whole process, at N and at 2 N training examples.
"""

import argparse
import shutil
import sys
from pathlib import Path

from common import capture, floor_of, fresh, interleaved, machine, opened, peak_mb, workload


def time_all(names: list[str], repeats: int, train: int | None) -> None:
    print("| | examples x checkpoints | floor | norms | discarded | on disk | MB kept |\n|---|---|---|---|---|---|---|")
    for name in names:
        with workload(name, train) as (work, run):
            kept, size = run / ".influence", 0

            def disk(run=run, kept=kept) -> float:
                nonlocal size
                shutil.rmtree(kept, ignore_errors=True)
                run_ = opened(run, str(kept))
                seconds = capture(run_, run_.gradients)
                size = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
                return seconds

            live = opened(run, "none")
            jobs = {
                "floor": floor_of(work),
                "norms": lambda live=live: capture(live, fresh(live, None), "norms"),
                "discarded": lambda live=live: capture(live, fresh(live, None)),
                "on disk": disk,
            }
            best = interleaved(jobs, repeats)
            unit = best["floor"] * work.n_ckpt
            ratios = " | ".join(f"{best[way] / unit:.2f}" for way in ("norms", "discarded", "on disk"))
            print(f"| {name} | {len(work.xtr):,} x {work.n_ckpt} | {best['floor']:.3f} s | {ratios} | {size / 1e6:,.0f} |", flush=True)


def memory(names: list[str], train: int | None) -> None:
    print("| | examples | peak MB | examples | peak MB |\n|---|---|---|---|---|")
    influence = str(Path(sys.executable).with_name("influence"))
    for name in names:
        cells = []
        for factor in (1, 2):
            with workload(name, train) as (work, _):
                count = factor * len(work.xtr)
            with workload(name, count) as (_, run):
                _, peak = peak_mb([influence, "cache", str(run), "--quiet"])
            cells += [f"{count:,}", f"{peak:,.0f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int)
    parser.add_argument("--memory", action="store_true")
    flags = parser.parse_args()
    print(machine())
    if flags.memory:
        memory(flags.workloads, flags.train)
    else:
        time_all(flags.workloads, flags.repeats, flags.train)


if __name__ == "__main__":
    main()
