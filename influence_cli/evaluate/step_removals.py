"""Measures what leaving one example out of one recorded step does (Wang et al. 2024,
arXiv:2412.09538).

Training continues from that step to its end without the example. The measured effects are compared
with the scores (evaluate/agreement.py).

effects[r, q] = m(theta' of removal r, q) - m(theta, q), both at the end; m is the query's loss, or
-measure if the definition has one. An effect above 0: the example was a proponent, without it the
loss is higher. m(theta) is that of a replay of the complete run.

Shape letters: R removals, Q queries.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

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
from influence_cli.evaluate.agreement import agreement_rows, root_mean_square, spread
from influence_cli.evaluate.declaration import EvaluationRequest, Row
from influence_cli.evaluate.predicted_effects import Removal, predict_effects
from influence_cli.evaluate.result_log import ResultLog
from influence_cli.evaluate.tsloo import TslooOptions
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.table import METHODS
from influence_cli.progress import Advance, Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.optimizer_state import find_state
from influence_cli.run.replay import DroppedExample, Replay
from influence_cli.run.run import Run
from influence_cli.run.trajectory import Trajectory, missing_trajectory

VERSION = 1  # of the stored results
LARGE_DISTANCE = 0.01  # from a replay to the saved checkpoint, relative to the way of training
ABOVE_NOISE = 10  # effects below this multiple of the noise are partly rounding error

Record = dict[str, Any]  # Any: a line of the result log; keys: see measure_baseline, retrain


def options_of(request: EvaluationRequest) -> TslooOptions:
    assert isinstance(request.options, TslooOptions)
    return request.options


def evaluate(source: GradientSource, request: EvaluationRequest) -> Iterator[Row]:
    """One row per method and query, then the method's `mean` over queries and all pairs `pooled`.

    Notes give the intervals of the means.
    """
    run, reporter, options = source.run, source.reporter, options_of(request)
    start, end = run.checkpoints[0], request.checkpoints[-1]
    trajectory = check_trajectory(run, start, end)
    size = source.budget.batch_size("train", list(run.columns))
    replay = Replay(run, lambda ids: source.extractor.batches.of("train", ids)[0], size)
    replay.start_from(start)
    for note in trajectory.notes:
        reporter.note(note)
    steps = range(start.step, end.step)
    removals = draw_removals(trajectory, steps, options.removals, request.seed)
    if len(removals) < options.removals:
        reporter.note(
            f"the run has only {len(removals)} occurrences (step, example), fewer than --removals "
            f"{options.removals}; tsloo removes each of them"
        )
    predicted = {
        name: predict_effects(source, METHODS[name], score_request, removals)
        for name, score_request in request.requests.items()
    }
    log = ResultLog(log_path(source, request, start, end))
    retrain(source, replay, end, removals, request, log)
    baseline = find_baseline(log)
    assert baseline is not None
    measured = measured_effects(log)
    effects_RQ = np.array([measured[removal] for removal in removals])
    noise_Q = np.abs(np.array(baseline["again"]) - np.array(baseline["values"]))
    note_limits(reporter, baseline, end, effects_RQ, noise_Q)
    return agreement_rows(source, request, predicted, effects_RQ, noise_Q)


def check_trajectory(run: Run, start: Checkpoint, end: Checkpoint) -> Trajectory:
    """Raises TrajectoryError: no trajectory, or one that ends too early; UsageProblem if no step
    was recorded between the two checkpoints.
    """
    trajectory = run.trajectory
    if trajectory is None:
        raise missing_trajectory("tsloo")
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


def draw_removals(trajectory: Trajectory, steps: range, number: int, seed: int) -> list[Removal]:
    """The first `number` of one random order of all (step, example) pairs.

    A larger number adds pairs and keeps these.
    """
    examples_at = [np.unique(trajectory.lines[step].examples) for step in steps]
    ends = np.cumsum([len(examples) for examples in examples_at])
    if not len(ends) or not ends[-1]:
        raise UsageProblem(
            f"{trajectory.path.name}: steps {steps.start} to {steps.stop - 1} have no examples",
            "tsloo has nothing to remove",
            "select other checkpoints with --steps",
        )
    removals = []
    for at in np.random.default_rng(seed).permutation(ends[-1])[:number]:
        line = int(np.searchsorted(ends, at, side="right"))
        removals.append(Removal(steps[line], int(examples_at[line][at - ends[line]])))
    return removals


# ---------------------------------------------------------------- measured effects
def log_path(
    source: GradientSource, request: EvaluationRequest, start: Checkpoint, end: Checkpoint
) -> Path | None:
    """The result log, named after a digest of all that the measured effects depend on."""
    run, settings = source.run, source.settings
    assert run.trajectory is not None
    if request.folder is None:
        return None
    parts: list[object] = [
        VERSION,
        run.definition.digest,
        hashlib.sha256(run.trajectory.path.read_bytes()).hexdigest(),
        checkpoint_key(start, request.folder / "checkpoints.json"),
        end.step,
        f"{'tf32' if settings.tf32 else settings.precision} {settings.mixed}",
        request.seed,
        options_of(request).renormalize,
        [int(query) for query in request.queries],
        run.query.digests(request.queries).tolist(),
    ]
    state = find_state(run.folder, start.step)
    if start.step and state.files:  # the replay starts from it
        parts.append(checkpoint_key(state, request.folder / "checkpoints.json"))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return request.folder / "evaluate" / f"tsloo-{digest}.jsonl"


def find_baseline(log: ResultLog) -> Record | None:
    return next((record for record in log.records if "values" in record), None)


def measured_effects(log: ResultLog) -> dict[Removal, list[float]]:
    """(Q,) measured effects of each removal so far. Raises CacheError for a damaged record."""
    try:
        return {
            Removal(record["step"], record["example"]): record["truth"]
            for record in log.records
            if "truth" in record
        }
    except (KeyError, TypeError) as error:
        raise CacheError(
            f"the results of evaluate have a damaged record: {type(error).__name__} {error}",
            "delete the folder evaluate of the cache; the same command computes its results again",
        ) from error


def retrain(
    source: GradientSource,
    replay: Replay,
    end: Checkpoint,
    removals: Sequence[Removal],
    request: EvaluationRequest,
    log: ResultLog,
) -> None:
    """Add what the log lacks: the complete run twice, then one training per removal from its
    step on.
    """
    start = source.run.checkpoints[0]
    known = measured_effects(log)
    missing = sorted(removal for removal in removals if removal not in known)
    baseline = find_baseline(log)
    steps = sum(end.step - removal.step for removal in missing)
    steps += missing[-1].step if missing else 0  # up to the last removal, without any
    steps += 0 if baseline else 2 * (end.step - start.step)
    with source.reporter.progress("retraining", steps) as advance:
        if baseline is None:
            baseline = measure_baseline(source, replay, end, request, advance)
            log.add(baseline)
        replay.start_from(start)
        state = replay.save_state()
        for number, removal in enumerate(missing, start=1):
            report_step = partial(advance, where=f"removal {number} of {len(missing)}")
            replay.restore(state)
            replay.advance(removal.step, report_progress=report_step)
            state = replay.save_state()
            drop = DroppedExample(*removal, options_of(request).renormalize)
            replay.advance(end.step, drop, baseline["max_norm"], report_progress=report_step)
            effects = query_values(source, request.queries) - np.array(baseline["values"])
            if not np.isfinite(effects).all():
                raise too_large(removal)
            log.add({**removal._asdict(), "truth": effects.tolist()})


def too_large(removal: Removal) -> GradientError:
    return GradientError(
        f"leaving example {removal.example} out of step {removal.step} changes the queries' losses "
        "by more than float64 holds",
        "look for a loss that is scaled up",
    )


def measure_baseline(
    source: GradientSource,
    replay: Replay,
    end: Checkpoint,
    request: EvaluationRequest,
    advance: Advance,
) -> Record:
    """The recorded run, replayed twice.

    `values`: m of each query. `again`: m after a replay with each batch in reverse order, clipped
    like removals; the difference is noise. `apart`: relative distance to the saved checkpoint.
    """
    start = source.run.checkpoints[0]
    replay.start_from(start)
    replay.advance(end.step, report_progress=partial(advance, where="the complete run"))
    values, distance = query_values(source, request.queries), replay.relative_distance(end)
    max_norm = float(np.median(list(replay.clipped.values()))) if replay.clipped else None
    replay.start_from(start)
    report_step = partial(advance, where="the complete run again")
    replay.advance(end.step, max_norm=max_norm, reverse=True, report_progress=report_step)
    return {
        "values": values.tolist(),
        "again": query_values(source, request.queries).tolist(),
        "apart": distance,
        "max_norm": max_norm,
    }


def query_values(source: GradientSource, queries: Ids) -> np.ndarray:
    """(Q,) m of each query at the model's current weights, float64.

    Autograd is on: a loss may differentiate by itself.
    """
    definition = source.run.definition
    size = source.budget.batch_size("train", list(source.run.columns))
    name = "measure" if definition.has("measure") else "loss"
    parts = []
    for first in range(0, len(queries), size):
        ids = np.array(queries[first : first + size])
        batch, _ = source.extractor.batches.of("query", ids)
        try:
            values = definition.raw(name)(source.run.model.module, batch)
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


def note_limits(
    reporter: Reporter,
    baseline: Mapping[str, Any],  # Any: a record
    end: Checkpoint,
    effects_RQ: np.ndarray,
    noise_Q: np.ndarray,
) -> None:
    """Notes that say how far the measured effects can be trusted."""
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
            "the run clipped gradients. After a removal, tsloo clips them at a norm of "
            f"{baseline['max_norm']:.4g}, the median of the recorded ones"
        )
    noise, size = root_mean_square(noise_Q), float(spread(effects_RQ))
    if 0 < size < ABOVE_NOISE * noise:
        reporter.note(
            f"the effects ({size:.2g}) are hardly larger than the noise of retraining "
            f"({noise:.2g}). Use --precision float64 to lower the noise"
        )
