"""The whole job against the floor: from an opened run to the ranked top 10 of every query, in three ways.

python benchmarks/score.py [w1 w2 w3 w4] [--repeats 3] [--train N]

none: --cache none, everything captured and discarded. disk: captured, kept, scored. again: scored from what is kept. Ratios are to the
floor (one forward+backward over the training examples) times the number of checkpoints, taken in turns in this process.
"""

import argparse
import shutil

from common import floor_of, fresh, interleaved, machine, opened, score, workload


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int)
    flags = parser.parse_args()
    print(machine())
    print(
        "| | examples x queries x checkpoints | floor | none | disk | again | MB kept |\n|---|---|---|---|---|---|---|"
    )
    for name in flags.workloads:
        with workload(name, flags.train) as (work, run):
            kept = run / ".influence"
            size = 0

            def disk(run=run, kept=kept) -> float:
                nonlocal size
                shutil.rmtree(kept, ignore_errors=True)
                run_ = opened(run, str(kept))
                seconds = score(run_, run_.gradients)
                size = sum(path.stat().st_size for path in kept.rglob("*.safetensors"))
                return seconds

            def again(run=run, kept=kept) -> float:
                run_ = opened(run, str(kept))
                return score(run_, run_.gradients)

            live = opened(run, "none")
            jobs = {
                "floor": floor_of(work),
                "none": lambda live=live: score(live, fresh(live, None)),
                "disk": disk,
                "again": again,
            }
            best = interleaved(jobs, flags.repeats)
            unit = best["floor"] * work.n_ckpt
            ratios = " | ".join(f"{best[way] / unit:.2f}" for way in ("none", "disk", "again"))
            print(
                f"| {name} | {len(work.xtr):,} x {len(work.xte)} x {work.n_ckpt} | {best['floor']:.3f} s | {ratios} | {size / 1e6:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
