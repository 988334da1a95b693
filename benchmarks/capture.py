"""Per-example gradients against the floor: what taking them costs, and keeping them.

python benchmarks/capture.py [w1 w2 w3 w4] [--repeats 3] [--train N] [--project 64 256] [--memory]

norms: squared norms and losses only, as `influence self` needs. discarded: every gradient, in the form in which it would be kept. on disk:
taken and kept, synced; --project: the same of tensor sketches of K numbers a parameter. Ratios are to the floor (one forward+backward over
the training examples) times the number of checkpoints, in turns in this process. --memory: peak memory of `influence cache` as a whole
process, at N and at 2 N training examples.
"""

import argparse
import shutil
import sys
from pathlib import Path

from common import capture, floor_of, fresh, interleaved, machine, opened, peak_mb, workload


def time_all(names: list[str], repeats: int, train: int | None, projected: list[int]) -> None:
    sketches = "".join(f" K = {numbers}, on disk | MB kept |" for numbers in projected)
    print(f"| | examples x checkpoints | floor | norms | discarded | on disk | MB kept |{sketches}")
    print("|---|---|---|---|---|---|---|" + "---|---|" * len(projected))
    for name in names:
        with workload(name, train) as (work, run):
            kept = run / ".influence"
            sizes: dict[int | None, int] = {}

            def disk(numbers: int | None, run=run, kept=kept, sizes=sizes) -> float:
                shutil.rmtree(kept, ignore_errors=True)
                run_ = opened(run, str(kept), project=numbers)
                seconds = capture(run_, run_.gradients)
                sizes[numbers] = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
                return seconds

            live = opened(run, "none")
            ways: list[int | None] = [None, *projected]
            jobs = {
                "floor": floor_of(work),
                "norms": lambda live=live: capture(live, fresh(live, None), "norms"),
                "discarded": lambda live=live: capture(live, fresh(live, None)),
                **{f"on disk {numbers}": lambda numbers=numbers: disk(numbers) for numbers in ways},
            }
            best = interleaved(jobs, repeats)
            unit = best["floor"] * work.n_ckpt
            ratios = " | ".join(f"{best[way] / unit:.2f}" for way in ("norms", "discarded"))
            on_disk = " | ".join(
                f"{best[f'on disk {numbers}'] / unit:.2f} | {sizes[numbers] / 1e6:,.0f}"
                for numbers in ways
            )
            print(
                f"| {name} | {len(work.xtr):,} x {work.n_ckpt} | {best['floor']:.3f} s | {ratios} | {on_disk} |",
                flush=True,
            )


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int)
    parser.add_argument("--project", type=int, nargs="*", default=[])
    parser.add_argument("--memory", action="store_true")
    flags = parser.parse_args()
    print(machine())
    if flags.memory:
        memory(flags.workloads, flags.train)
    else:
        time_all(flags.workloads, flags.repeats, flags.train, flags.project)


if __name__ == "__main__":
    main()
