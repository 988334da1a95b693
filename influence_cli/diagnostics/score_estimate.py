"""Estimates what `score` takes by inner products: disk, memory, time, and the path it takes.

It measures a ScoreTrial, a small part of `score`.
"""

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from influence_cli.cache.store import DIRECT_FROM
from influence_cli.diagnostics import cost_estimate
from influence_cli.diagnostics.cost_estimate import GradientCount, Speed
from influence_cli.extraction import machine
from influence_cli.extraction.source import GradientSource, IdsAt
from influence_cli.methods.query_passes import block_size, round_block_size
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.score_trial import ScoreTrial
from influence_cli.progress import format_bytes
from influence_cli.run.checkpoints import Checkpoint

MOST_READ = 1 << 16  # stored gradients that are read to measure


@dataclass(frozen=True)
class ScoreJob:
    """What `score` has to do. `folder`: of the cache, None for --cache none. `train`, `query`: the
    gradients of each split.
    """

    source: GradientSource
    request: ScoreRequest
    trial: ScoreTrial
    folder: Path | None
    train: GradientCount
    query: GradientCount

    @property
    def columns(self) -> list[str]:
        return list(self.request.columns)

    @property
    def disk_bytes(self) -> int:
        return self.train.disk_bytes + self.query.disk_bytes

    @property
    def computed(self) -> int:
        """How many training gradients `score` computes."""
        return self.train.missing * self.trial.plan.captures

    @property
    def read(self) -> int:
        """How many training gradients `score` reads from the cache: those that it has at the first
        pass, and all at later ones.
        """
        if self.folder is None:
            return 0
        later = len(self.trial.plan.passes) - 1
        return self.train.total - self.train.missing + later * self.train.total


def measure(job: ScoreJob) -> Speed:
    """Measures what the job has to do, and nothing else."""
    trial, checkpoint = job.trial, job.request.checkpoints[0]
    speed = Speed(0.0, machine.peak_memory())
    if job.computed:
        speed = cost_estimate.measure_speed(
            job.source, checkpoint, job.columns, job.folder, job.disk_bytes, trial.compute
        )
    query_seconds = measure_queries(job) if job.query.missing else 0.0
    read_seconds = measure_stored(job) if job.read else 0.0
    if job.read and not read_seconds:  # nothing is stored yet
        read_seconds = measure_products(job) + stored_bytes_each(job) / (speed.disk_speed or 1e9)
    return dataclasses.replace(
        speed,
        peak_bytes=machine.peak_memory() if not job.computed else speed.peak_bytes,
        query_seconds=query_seconds,
        read_seconds=read_seconds,
    )


def measure_queries(job: ScoreJob) -> float:
    """Seconds per query gradient."""
    batch = job.source.budget.batch_size("query", job.columns)
    ids = np.asarray(job.request.queries[:batch])
    started = time.perf_counter()
    job.source.extractor.rows_at(job.request.checkpoints[0], "query", job.columns, ids)
    return (time.perf_counter() - started) / len(ids)


def measure_stored(job: ScoreJob) -> float:
    """Seconds per training gradient that is read from the cache and multiplied; 0 where there is
    none.
    """
    stored = [(point, stored_ids(job, point)) for point in job.request.checkpoints]
    ids_at = [(point, ids) for point, ids in stored if len(ids)]
    if not ids_at:
        return 0.0
    point, ids = ids_at[0]
    unit = job.source.budget.unit_size("train", job.columns, "values")
    read_while(job, [(point, ids[:unit])])  # warms up
    seconds, count = read_while(job, ids_at)
    return seconds / count


def stored_ids(job: ScoreJob, checkpoint: Checkpoint) -> np.ndarray:
    """Training examples whose gradients the cache has, among the first MOST_READ."""
    if job.source.cache is None:
        return np.array([], dtype=np.int64)
    ids = np.asarray(job.request.train[:MOST_READ])
    index = job.source.cache.index("train", checkpoint)
    numbers = [index.locate(column, "values", ids) for column in job.columns]
    return ids[np.min(numbers, axis=0) >= 0]


def read_while(job: ScoreJob, ids_at: Sequence[IdsAt]) -> tuple[float, int]:
    """Read and multiply stored gradients for SECONDS at most: seconds, and their number."""
    started, count = time.perf_counter(), 0
    for rows in job.source.read_each("train", ids_at, job.columns):
        job.trial.multiply(rows)
        count += len(rows.ids)
        if time.perf_counter() - started > cost_estimate.SECONDS:
            break
    return time.perf_counter() - started, count


def measure_products(job: ScoreJob) -> float:
    """Seconds per training gradient, for its products with the queries of one pass."""
    batch = job.source.budget.batch_size("train", job.columns)
    ids = np.asarray(job.request.train[:batch])
    rows = job.source.recompute("train", job.request.checkpoints[0], job.columns, ids)
    job.trial.multiply(rows)  # warms up
    started = time.perf_counter()
    job.trial.multiply(rows)
    return (time.perf_counter() - started) / len(ids)


def stored_bytes_each(job: ScoreJob) -> float:
    """Bytes of a training gradient that come from the disk: 0 where the page cache has them."""
    if job.train.disk_bytes <= DIRECT_FROM:
        return 0.0
    return job.train.disk_bytes / job.train.missing


def estimate_seconds(job: ScoreJob, speed: Speed) -> float:
    """From an opened run to the ranked table."""
    computed = cost_estimate.estimate_seconds(
        job.source, job.columns, speed, job.computed, job.disk_bytes
    )
    return computed + job.query.missing * speed.query_seconds + job.read * speed.read_seconds


def estimate_peak_bytes(job: ScoreJob, speed: Speed) -> int:
    """Memory of the process at most: the measured peak, and what the trial did not hold.

    That is: query gradients of other checkpoints, units of the cache, the scores of a block, and
    in a round of several passes the training gradients of a block and the pass that is read ahead.
    """
    trial, plan, request = job.trial, job.trial.plan, job.request
    width = 1 if request.sum_queries else min(plan.round_size, len(plan.queries))
    size_of = round_block_size if trial.path == "blocks" else block_size
    size = min(size_of(job.source, request, width), len(request.train))
    if trial.path == "blocks":
        forms = job.source.budget.sizes("train", job.columns).example_bytes(job.columns)
        extra = trial.pass_bytes + size * forms
    else:
        extra = (len(request.checkpoints) - 1) * trial.pass_bytes
    extra += 8 * size * width * (1 + len(request.parts))
    if job.folder is None:
        return speed.peak_bytes + extra
    units = cost_estimate.estimate_peak_bytes(job.source, job.columns, speed, job.train.missing)
    return units + extra


def describe_path(job: ScoreJob) -> str:
    """How `score` gets training gradients and multiplies them, and why."""
    if job.trial.path == "fused":
        return (
            "--cache none: multiplies each layer's gradients in the backward pass, and keeps none"
        )
    if job.trial.path == "blocks":
        return (
            "--cache none, and queries that exceed memory: computes training gradients block by "
            "block, and multiplies a block with one pass of queries after the other"
        )
    if not job.train.missing:
        return "reads stored gradients: the cache has all of them"
    return (
        f"one pass: it computes, stores and multiplies the {job.train.missing:,} training "
        "gradients that the cache lacks"
    )


def describe_passes(job: ScoreJob) -> str | None:
    """The passes of the queries; None for one pass."""
    plan = job.trial.plan
    if len(plan.passes) == 1:
        return None
    times = "once" if plan.captures == 1 else f"{plan.captures} times"
    text = (
        f"{len(plan.queries):,} in {len(plan.passes)} passes of {plan.pass_size:,}; "
        f"each training gradient is computed {times}"
    )
    if plan.cached:
        return f"{text} and read from the cache in later passes"
    if plan.disk_bytes:
        return f"{text}; {format_bytes(plan.disk_bytes)} of query gradients in a temporary folder"
    return text
