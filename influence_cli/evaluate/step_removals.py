"""Measures what leaving one example out of one recorded step does (Wang et al. 2024,
arXiv:2412.09538).

Training continues from that step to its end without the example. The measured effects are compared
with the scores (evaluate/effect_correlations.py).

effects[r, q] = m(theta' of removal r, q) - m(theta, q), both at the end; m is the query's loss, or
-measure if the definition has one. An effect above 0: the example was a proponent, without it the
loss is higher. m(theta) is that of a replay of the complete run.

Shape letters: R removals, Q queries.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from time import perf_counter

import numpy as np

from influence_cli.errors import GradientError, UsageProblem, counted
from influence_cli.evaluate.declaration import EvaluationRequest, Figure, describe_cost
from influence_cli.evaluate.effect_correlations import FigureMaker
from influence_cli.evaluate.predicted_effects import Removal, predict_effects
from influence_cli.evaluate.result_log import ResultLog, total_seconds
from influence_cli.evaluate.retraining import (
    check_trajectory,
    damaged_record,
    find_baseline,
    log_path,
    noise_of,
    note_noise,
    note_replay,
    open_replay,
    query_values,
    replay_baseline,
)
from influence_cli.evaluate.tsloo import TslooOptions
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.table import METHODS
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.replay import DroppedExample, Replay
from influence_cli.run.trajectory import Trajectory


def options_of(request: EvaluationRequest) -> TslooOptions:
    assert isinstance(request.options, TslooOptions)
    return request.options


def evaluate(source: GradientSource, request: EvaluationRequest) -> Iterator[Figure]:
    """Correlations of each method's scores with the effects of removals, per query and their mean
    over queries; then the size of the effects and their noise.
    """
    run, reporter, options = source.run, source.reporter, options_of(request)
    start, end = run.checkpoints[0], request.checkpoints[-1]
    trajectory = check_trajectory(run, start, end, "tsloo")
    replay = open_replay(source)
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
    log = ResultLog(log_path(source, request, "tsloo", [request.seed, options.renormalize]))
    retrain(source, replay, end, removals, request, log)
    baseline = find_baseline(log)
    assert baseline is not None
    measured = measured_effects(log)
    effects_RQ = np.array([measured[removal] for removal in removals])
    noise_Q = noise_of(baseline)
    note_replay(reporter, baseline, end, "tsloo")
    note_noise(reporter, effects_RQ, noise_Q)
    figures = FigureMaker(list(request.queries), cost_of(log, removals), request.seed)
    for name, predicted_RQ in predicted.items():
        yield from figures.correlations(name, predicted_RQ, effects_RQ, reporter)
        yield from figures.pooled(name, predicted_RQ, effects_RQ)
    yield from figures.sizes(effects_RQ, noise_Q)


def cost_of(log: ResultLog, removals: Sequence[Removal]) -> str:
    """Of the two complete runs, and of one training per removal."""
    chosen = set(removals)
    records = [
        record
        for record in log.records
        if "truth" not in record or Removal(record["step"], record["example"]) in chosen
    ]
    return describe_cost(2 + len(removals), total_seconds(records))


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
def measured_effects(log: ResultLog) -> dict[Removal, list[float]]:
    """(Q,) measured effects of each removal so far. Raises CacheError for a damaged record."""
    try:
        return {
            Removal(record["step"], record["example"]): record["truth"]
            for record in log.records
            if "truth" in record
        }
    except (KeyError, TypeError) as error:
        raise damaged_record(error) from error


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
    missing = missing_removals(removals, log)
    baseline = find_baseline(log)
    steps = sum(end.step - removal.step for removal in missing)
    steps += missing[-1].step if missing else 0  # up to the last removal, without any
    steps += 0 if baseline else 2 * (end.step - start.step)
    with source.reporter.progress("retraining", steps) as advance:
        if baseline is None:
            baseline = replay_baseline(source, replay, request, advance)
            log.add(baseline)
        walk, at = ReplayWalk(replay, start), 0
        while missing:
            removal = missing[at % len(missing)]
            started = perf_counter()
            report_step = partial(advance, where=f"{counted(len(missing), 'removal')} left")
            walk.go_to(removal.step, report_step)
            drop = DroppedExample(*removal, options_of(request).renormalize)
            replay.advance(end.step, drop, baseline["max_norm"], report_progress=report_step)
            effects = query_values(source, request.queries) - np.array(baseline["values"])
            if not np.isfinite(effects).all():
                raise too_large(removal)
            record = {**removal._asdict(), "truth": effects.tolist()}
            is_new = log.add({**record, "seconds": perf_counter() - started})
            rest = missing_removals(missing, log)  # the log has read what other processes added
            if not is_new or len(rest) < len(missing) - 1:
                at = random.randrange(len(missing))  # away from the other process
            missing = rest


def missing_removals(removals: Sequence[Removal], log: ResultLog) -> list[Removal]:
    """Those that the log does not have, by step."""
    known = measured_effects(log)
    return sorted(removal for removal in removals if removal not in known)


class ReplayWalk:
    """Replays the complete run up to one step after another, each part of it once if they rise."""

    def __init__(self, replay: Replay, start: Checkpoint) -> None:
        self.replay, self.start = replay, start
        self.replay.start_from(start)
        self._state, self._step = replay.save_state(), start.step

    def go_to(self, step: int, advance: Advance) -> None:
        """Put model and optimizer where they are before this step."""
        if step < self._step:
            self.replay.start_from(self.start)
        else:
            self.replay.restore(self._state)
        self.replay.advance(step, report_progress=advance)
        self._state, self._step = self.replay.save_state(), step


def too_large(removal: Removal) -> GradientError:
    return GradientError(
        f"leaving example {removal.example} out of step {removal.step} changes the queries' losses "
        "by more than float64 holds",
        "look for a loss that is scaled up",
    )
