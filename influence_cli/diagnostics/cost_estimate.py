"""Estimates what the missing gradients need: disk, memory and time.

`inspect` shows the estimate. It computes gradients for about two seconds and stores none.
"""

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.store import DIRECT_FROM
from influence_cli.extraction import machine
from influence_cli.extraction.source import GradientSource
from influence_cli.run.checkpoints import Checkpoint

SECONDS = 1.5  # how long the measurement computes gradients
Compute = Callable[[np.ndarray], object]  # of these training examples


@dataclass(frozen=True)
class GradientCount:
    """Gradients of a split, and what the missing ones need.

    `total`: pairs of example and checkpoint. `missing`: those that the cache lacks. `disk_bytes`:
    to store them. `memory_bytes`: to compute them.
    """

    examples: int
    total: int
    missing: int
    disk_bytes: int
    memory_bytes: int


def count_gradients(
    source: GradientSource,
    split: str,
    ids_at: Sequence[tuple[Checkpoint, Ids]],
    columns: Sequence[str],
) -> GradientCount:
    """`ids_at`: the examples of each checkpoint."""
    missing = source.count_uncached(split, ids_at, columns)
    disk_bytes, memory_bytes = source.budget.needs(split, columns, missing)
    total = sum(len(ids) for _, ids in ids_at)
    examples = count_distinct([ids for _, ids in ids_at])
    return GradientCount(examples, total, missing, disk_bytes, memory_bytes)


def count_distinct(parts: Sequence[Ids]) -> int:
    if not parts:
        return 0
    if all(part is parts[0] for part in parts):
        return len(parts[0])
    return len(np.unique(np.concatenate([np.asarray(part) for part in parts])))


@dataclass(frozen=True)
class Speed:
    """Measured on this machine.

    `gradient_seconds`: per training gradient that is computed, with its products. `read_seconds`:
    per stored one, with its products. `query_seconds`: per query gradient that is computed. 0: not
    measured. `peak_bytes`: memory of this process so far. `disk_speed`: bytes per second, 0 if not
    measured. `slowdown`: seconds by which each written byte slows down the computation beside it.
    """

    gradient_seconds: float
    peak_bytes: int
    disk_speed: float = 0.0
    slowdown: float = 0.0
    read_seconds: float = 0.0
    query_seconds: float = 0.0


def measure_speed(
    source: GradientSource,
    checkpoint: Checkpoint,
    columns: Sequence[str],
    folder: Path | None,
    disk_bytes: int,
    compute: Compute | None = None,
) -> Speed:
    """Compute batches of training examples, first alone, then beside writing 128 MB to the disk of
    the cache.

    `folder`: of the cache, which may not exist yet; None: nothing is written. `disk_bytes`: that
    the cache will write; it decides the way of writing. `compute`: None computes gradients alone.
    """
    batch, total = source.budget.batch_size("train", columns), len(source.run.train)
    if compute is None:
        compute = partial(source.extractor.rows_at, checkpoint, "train", columns)

    def compute_while(condition: Callable[[], bool]) -> tuple[float, int]:
        """Seconds, and the number of gradients."""
        start, count = time.perf_counter(), 0
        while not count or condition():
            ids = np.arange(count % total, min(count % total + batch, total))
            compute(ids)
            count += len(ids)
        return time.perf_counter() - start, count

    # the first batch loads the checkpoint, probes the model and warms up
    compute(np.arange(min(batch, total)))
    end = time.perf_counter() + SECONDS
    elapsed, count = compute_while(lambda: time.perf_counter() < end)
    seconds, peak = elapsed / count, machine.peak_memory()
    if folder is None:
        return Speed(seconds, peak)
    with ThreadPoolExecutor(1) as thread:
        writing = thread.submit(machine.disk_speed, folder, disk_bytes > DIRECT_FROM)
        elapsed, count = compute_while(lambda: not writing.done())
    slowdown = max(0.0, elapsed - count * seconds) / machine.TRIAL_BYTES
    return Speed(seconds, peak, writing.result(), slowdown)


def estimate_seconds(
    source: GradientSource,
    columns: Sequence[str],
    speed: Speed,
    gradients: int,
    disk_bytes: int,
) -> float:
    """Time to compute `gradients` and to write `disk_bytes`.

    A unit is written while the next one is computed. The last unit is written alone.
    """
    seconds = gradients * speed.gradient_seconds
    if not speed.disk_speed:
        return seconds
    unit_bytes = source.budget.needs("train", columns, 1)[0]
    unit_bytes *= source.budget.unit_size("train", columns, "values")
    overlapped = max(seconds + disk_bytes * speed.slowdown, disk_bytes / speed.disk_speed)
    return overlapped + min(disk_bytes, unit_bytes) / speed.disk_speed


def estimate_peak_bytes(
    source: GradientSource, columns: Sequence[str], speed: Speed, missing: int
) -> int:
    """Memory of the process at most: the measured peak, and the units that it holds."""
    with_units = source.budget.needs("train", columns, missing)[1]
    return speed.peak_bytes + with_units - source.budget.needs("train", columns, 0)[1]


def free_disk_bytes(folder: Path) -> int:
    """Free bytes on the disk of a folder that may not exist yet."""
    return shutil.disk_usage(machine.existing_folder(folder)).free
