"""Fitting the curvature of `influence` against the floor.

python benchmarks/curvature.py [w1 w2 w3] [--train N] [--repeats 2]

new: nothing is cached, so the gradients are computed and stored, too. cached: the gradients of the last checkpoint are there. Ratios are to
the floor: one forward+backward over the training examples, in turns in this process.
"""

import argparse
import shutil
import time
from pathlib import Path

from common import floor_of, fresh, interleaved, machine, opened, workload

from influence_cli.preconditioners.fit import fit_maps
from influence_cli.preconditioners.kinds import KINDS


def fit(run: Path, cache: Path, kind: str, is_new: bool) -> float:
    """Seconds of one fit, and of computing the gradients if they are new."""
    shutil.rmtree(cache / "preconditioners", ignore_errors=True)
    if is_new:
        shutil.rmtree(cache, ignore_errors=True)
    live = opened(run, str(cache))
    source = fresh(live, str(cache))
    started = time.perf_counter()
    fit_maps(source, live.checkpoints[-1], live.columns, kind)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"])
    parser.add_argument("--train", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    flags = parser.parse_args()
    print(machine())
    print("| | examples | floor | " + " | ".join(f"{k}, new | {k}, cached" for k in KINDS) + " |")
    print("|---" * (3 + 2 * len(KINDS)) + "|")
    for name in flags.workloads:
        with workload(name, flags.train) as (work, run):
            cache = run / ".influence"
            jobs = {"floor": floor_of(work)}
            for kind in KINDS:
                for is_new in (True, False):
                    jobs[f"{kind} {is_new}"] = (
                        lambda run=run, cache=cache, kind=kind, is_new=is_new: fit(
                            run, cache, kind, is_new
                        )
                    )
            best = interleaved(jobs, flags.repeats)
            floor = best.pop("floor")
            ratios = " | ".join(f"{seconds / floor:.2f}" for seconds in best.values())
            print(f"| {name} | {len(work.xtr):,} | {floor:.3f} s | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
