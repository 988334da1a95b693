"""What comparing checksums costs when scoring from the cache: the least of each way, taken in turns in one process.

python benchmarks/checksums.py [w1 w3] [--repeats 7] [--train N]

none: only headers, losses and norms are compared. share: gradients as long as the rule of cache/verification.py allows. all: --verify.
Seconds are of wall clock, then of processors (all threads). The files are in the page cache. OMP_NUM_THREADS=1 leaves the second core to
the thread that reads ahead and computes the CRC-32.
"""

import argparse
import time
from pathlib import Path

from common import machine, opened, score, workload

from influence_cli.cache import verification

SHARES = {"none": 0.0, "share": verification.SHARE, "all": float("inf")}


def score_again(run: Path, way: str) -> tuple[float, float, int]:
    """Seconds of wall clock and of processors, and the bytes that were not compared."""
    verification.SHARE = SHARES[way]
    again = opened(run, str(run / ".influence"))
    verification.START = time.perf_counter()  # as if the command began here
    before = time.process_time()
    seconds = score(again, again.gradients)
    assert again.gradients.cache is not None
    return seconds, time.process_time() - before, again.gradients.cache.store.verification.skipped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w3"])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--train", type=int)
    flags = parser.parse_args()
    print(machine())
    print(
        "| | MB | none | share | all | all / none | none, CPU | all, CPU | all / none | compared by share |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for name in flags.workloads:
        with workload(name, flags.train) as (_, run):
            score_again(run, "all")  # computes what is stored
            times: dict[str, list[tuple[float, float, int]]] = {way: [] for way in SHARES}
            for _ in range(flags.repeats):
                for way in SHARES:
                    times[way].append(score_again(run, way))
            size = sum(path.stat().st_size for path in (run / ".influence").rglob("*.safetensors"))
            wall = {way: min(seconds for seconds, _, _ in times[way]) for way in SHARES}
            cpu = {way: min(seconds for _, seconds, _ in times[way]) for way in SHARES}
            compared = 1 - times["share"][-1][2] / times["none"][-1][2]
            seconds = " | ".join(f"{wall[way]:.3f} s" for way in SHARES)
            print(
                f"| {name} | {size / 1e6:,.0f} | {seconds} | {wall['all'] / wall['none']:.2f} | {cpu['none']:.2f} s | {cpu['all']:.2f} s "
                f"| {cpu['all'] / cpu['none']:.2f} | {compared:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
