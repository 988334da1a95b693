"""What every protocol that retrains shares: the recorded run replayed, each query's m at its end,
and where finished results are stored.

m is the query's loss, or -measure if the definition has one.

Shape letters: R measurements, Q queries.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from torch import Tensor, nn

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import checkpoint_key
from influence_cli.errors import (
    CacheError,
    GradientError,
    InfluenceError,
    TrajectoryError,
    UsageProblem,
    is_out_of_memory,
)
from influence_cli.evaluate.declaration import EvaluationRequest
from influence_cli.evaluate.effect_correlations import root_mean_square, spread
from influence_cli.evaluate.result_log import Record, ResultLog
from influence_cli.extraction.source import GradientSource
from influence_cli.progress import Advance, Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.optimizer_state import find_state
from influence_cli.run.replay import Replay
from influence_cli.run.run import Run
from influence_cli.run.trajectory import Trajectory, missing_trajectory

VERSION = 1  # of the stored results
LARGE_DISTANCE = 0.01  # from a replay to the saved checkpoint, relative to the way of training
ABOVE_NOISE = 10  # effects below this multiple of the noise are partly rounding error


def check_trajectory(run: Run, start: Checkpoint, end: Checkpoint, protocol: str) -> Trajectory:
    """Raises TrajectoryError: no trajectory, or one that ends too early; UsageProblem if no step
    was recorded between the two checkpoints.
    """
    trajectory = run.trajectory
    if trajectory is None:
        raise missing_trajectory(protocol)
    if end.step > trajectory.steps:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {end.name}",
            f"it records steps 0 to {trajectory.steps - 1:,}, so it explains checkpoints up to "
            f"step {trajectory.steps:,}",
            "leave out later checkpoints with --steps, or give the trajectory of this run with "
            "--trajectory FILE",
        )
    if end.step == start.step:
        raise UsageProblem(
            "no step lies between the first checkpoint of the run and the last selected one",
            f"found: both are {end.name}",
            "select a later checkpoint with --steps",
        )
    return trajectory


def open_replay(source: GradientSource) -> Replay:
    """A replay of the run, with the batches of the run's own training examples."""
    size = source.budget.batch_size("train", list(source.run.columns))
    return Replay(source.run, lambda ids: source.extractor.batches.of("train", ids)[0], size)


# ---------------------------------------------------------------- stored results
def log_path(
    source: GradientSource, request: EvaluationRequest, name: str, parts: Sequence[object]
) -> Path | None:
    """The result log, named after a digest of all that the results depend on: `parts`, the
    definition, the recorded training, the precision and the queries.
    """
    run, settings = source.run, source.settings
    if request.folder is None:
        return None
    start, end = run.checkpoints[0], request.checkpoints[-1]
    record = run.trajectory.path.read_bytes() if run.trajectory else b""
    digested: list[object] = [
        VERSION,
        run.definition.digest,
        hashlib.sha256(record).hexdigest(),
        checkpoint_key(start, request.folder / "checkpoints.json"),
        end.step,
        f"{'tf32' if settings.tf32 else settings.precision} {settings.mixed}",
        *parts,
        [int(query) for query in request.queries],
        run.query.digests(request.queries).tolist(),
    ]
    state = find_state(run.folder, start.step)
    if start.step and state.files:  # the replay starts from it
        digested.append(checkpoint_key(state, request.folder / "checkpoints.json"))
    digest = hashlib.sha256(json.dumps(digested).encode()).hexdigest()[:16]
    return request.folder / "evaluate" / f"{name}-{digest}.jsonl"


def find_baseline(log: ResultLog) -> Record | None:
    return next((record for record in log.records if "again" in record), None)


def damaged_record(error: Exception) -> CacheError:
    return CacheError(
        f"the results of evaluate have a damaged record: {type(error).__name__} {error}",
        "delete the folder evaluate of the cache; the same command computes its results again",
    )


# ---------------------------------------------------------------- measurements
def replay_baseline(
    source: GradientSource, replay: Replay, request: EvaluationRequest, advance: Advance
) -> Record:
    """The recorded run, replayed twice.

    `values`: m of each query. `again`: m after a replay with each batch in reverse order, clipped
    like removals; the difference is noise. `apart`: relative distance to the saved checkpoint.
    """
    started, end = perf_counter(), request.checkpoints[-1]
    replay.start_from(source.run.checkpoints[0])
    replay.advance(end.step, report_progress=partial(advance, where="the complete run"))
    values, distance = query_values(source, request.queries), replay.relative_distance(end)
    max_norm = float(np.median(list(replay.clipped.values()))) if replay.clipped else None
    replay.start_from(source.run.checkpoints[0])
    report_step = partial(advance, where="the complete run again")
    replay.advance(end.step, max_norm=max_norm, reverse=True, report_progress=report_step)
    return {
        "values": values.tolist(),
        "again": query_values(source, request.queries).tolist(),
        "apart": distance,
        "max_norm": max_norm,
        "seconds": perf_counter() - started,
    }


def query_values(
    source: GradientSource, queries: Ids, module: nn.Module | None = None
) -> np.ndarray:
    """(Q,) m of each query, float64, of the run's model with its current weights, or of `module`.

    Autograd is on: a loss may differentiate by itself.
    """
    definition = source.run.definition
    size = source.budget.batch_size("train", list(source.run.columns))
    name = "measure" if definition.has("measure") else "loss"
    trained = source.run.model.module if module is None else module
    parts = []
    for first in range(0, len(queries), size):
        ids = np.array(queries[first : first + size])
        batch, _ = source.extractor.batches.of("query", ids)
        try:
            values = definition.raw(name)(trained, batch)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise InfluenceError(
                    f"out of memory in a batch of {len(ids)} queries",
                    "compute fewer queries at once: --batch-size N",
                ) from error
            raise describe_failure(definition, name, error) from error
        if not isinstance(values, Tensor) or values.shape != (len(ids),):
            raise GradientError(
                f"{name}() did not return one number per query",
                f"expected: a tensor of shape ({len(ids)},)",
            )
        parts.append(values.detach().cpu().double().numpy())
    values_Q = np.concatenate(parts)
    if not np.isfinite(values_Q).all():
        query = int(np.asarray(queries)[~np.isfinite(values_Q)][0])
        raise GradientError(
            f"retraining diverged: {name}() of query {query} is not finite at its end",
            "check lr, weights and clip in the trajectory: are they those of the run?",
        )
    return -values_Q if name == "measure" else values_Q


# ---------------------------------------------------------------- notes
def note_replay(
    reporter: Reporter,
    baseline: Mapping[str, Any],  # Any: a record
    end: Checkpoint,
    protocol: str,
) -> None:
    """Notes that say how well the replay reproduces the recorded training."""
    distance = baseline["apart"]
    note = f"relative distance from the replay to {end.name}: {distance:.2g}"
    if distance > LARGE_DISTANCE:
        note += (
            f" (limit {LARGE_DISTANCE}). The replay differs from the recorded training (dropout, "
            "BatchNorm, another machine or precision). The measured effects are those of the replay"
        )
    reporter.note(note)
    if baseline["max_norm"] is not None:
        reporter.note(
            f"the run clipped gradients. After a removal, {protocol} clips them at a norm of "
            f"{baseline['max_norm']:.4g}, the median of the recorded ones"
        )


def note_noise(reporter: Reporter, effects_RQ: np.ndarray, noise_Q: np.ndarray) -> None:
    """A note where the effects are hardly larger than the noise."""
    noise, size = root_mean_square(noise_Q), float(spread(effects_RQ))
    if 0 < size < ABOVE_NOISE * noise:
        reporter.note(
            f"the effects ({size:.2g}) are hardly larger than the noise of retraining "
            f"({noise:.2g}). Use --precision float64 to lower the noise"
        )


def noise_of(baseline: Mapping[str, Any]) -> np.ndarray:  # Any: a record
    """(Q,) the difference between two trainings that should be equal."""
    return np.abs(np.array(baseline["again"]) - np.array(baseline["values"]))
