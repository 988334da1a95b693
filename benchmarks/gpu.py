"""Scoring on a CUDA device, against the floor on the same device.

python benchmarks/gpu.py [w1 w2 w3 w4] [--repeats 3] [--train N]

none: --cache none. disk: computed, stored, scored. again: from what is stored. Ratios are to one
forward and backward pass of the training examples times the number of checkpoints, in turns. GEMM is
the share of the device's time in matrix products with --cache none; peak is its memory.
tests/test_gpu.py compares the scores with those of the CPU. Without a CUDA device it prints one line.
"""

import argparse
import shutil
import time
from collections.abc import Callable

import torch
from common import BATCHES, fresh, interleaved, machine, opened, score, workload
from torch.profiler import ProfilerActivity, profile
from workloads import Work

MATRIX_PRODUCTS = ("gemm", "cutlass", "cublas", "gemv", "wgrad", "dgrad", "implicit", "nvjet")


def floor_on(work: Work, device: str) -> Callable[[], float]:
    """Least seconds over the workload's batch sizes."""
    work.model.to(device)
    x, y = work.xtr.to(device), work.ytr.to(device)

    def seconds(size: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for first in range(0, len(x), size):
            at = slice(first, first + size)
            loss = work.loss_each(work.model(x[at]), y[at]).mean()
            torch.autograd.grad(loss, list(work.model.parameters()))
        torch.cuda.synchronize()
        return time.perf_counter() - started

    sizes = {*BATCHES[work.name], 256}
    return lambda: min(seconds(size) for size in sizes)


def gemm_share(job: Callable[[], object]) -> float:
    """Share of the device's time in kernels of matrix products and convolutions."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        job()
    times = {event.key: event.self_device_time_total for event in profiler.key_averages()}
    products = sum(
        spent
        for name, spent in times.items()
        if any(part in name.lower() for part in MATRIX_PRODUCTS)
    )
    return products / max(1, sum(times.values()))


def measure(name: str, train: int | None, repeats: int) -> str:
    with workload(name, train) as (work, run):
        cache = run / ".influence"

        def disk() -> float:
            shutil.rmtree(cache, ignore_errors=True)
            stored = opened(run, str(cache), device="cuda")
            return score(stored, stored.gradients)

        def again() -> float:
            stored = opened(run, str(cache), device="cuda")
            return score(stored, stored.gradients)

        live = opened(run, "none", device="cuda")
        jobs = {
            "floor": floor_on(work, "cuda"),
            "none": lambda: score(live, fresh(live, None)),
            "disk": disk,
            "again": again,
        }
        best = interleaved(jobs, repeats)
        unit = best["floor"] * work.n_ckpt
        ratios = " | ".join(f"{best[way] / unit:.2f}" for way in ("none", "disk", "again"))
        torch.cuda.reset_peak_memory_stats()
        share = gemm_share(jobs["none"])
        peak = torch.cuda.max_memory_allocated() / 1e6
        sizes = f"{len(work.xtr):,} x {len(work.xte)} x {work.n_ckpt}"
        return f"| {name} | {sizes} | {best['floor']:.3f} s | {ratios} | {share:.0%} | {peak:,.0f} MB |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3", "w4"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--train", type=int)
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    print(f"{torch.cuda.get_device_name()}; {machine()}")
    print("| | examples x queries x checkpoints | floor | none | disk | again | GEMM | peak |")
    print("|---|---|---|---|---|---|---|---|")
    for name in flags.workloads:
        print(measure(name, flags.train, flags.repeats), flush=True)


if __name__ == "__main__":
    main()
