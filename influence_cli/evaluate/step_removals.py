"""Trajectory-specific leave-one-out (Wang et al. 2024, arXiv:2412.09538): one example is left out
of one recorded step, training goes on from there to its end, and what that did to each query is
compared with what the scores said.

truth[r, q] = m(theta' of removal r, q) - m(theta, q), both at the end; m is the query's loss, or
-measure where the definition has one. Above 0: the example was a proponent, without it the loss is
higher. m(theta) is that of a replay of the whole run.

R removals, Q queries.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import checkpoint_key
from influence_cli.errors import (
    GradientError,
    InfluenceError,
    TrajectoryError,
    UsageProblem,
    is_out_of_memory,
)
from influence_cli.evaluate.correlation import interval, pearson, spearman
from influence_cli.evaluate.declaration import EvaluationRequest
from influence_cli.evaluate.predicted_effects import Removal, scores
from influence_cli.evaluate.result_log import Results
from influence_cli.evaluate.tsloo import TslooOptions
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.table import METHODS
from influence_cli.progress import Advance, Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.replay import Drop, Replay
from influence_cli.run.run import Run
from influence_cli.run.trajectory import Trajectory, missing_trajectory

VERSION = 1  # of the results on file
# a replay that ends so far from the saved checkpoint, of the way that training went, is another
# training
FAR = 0.01
ABOVE_NOISE = 10  # effects smaller than so many times the noise are rounding in part


def options_of(request: EvaluationRequest) -> TslooOptions:
    assert isinstance(request.options, TslooOptions)
    return request.options


def evaluate(gradients: GradientSource, request: EvaluationRequest) -> Iterator[tuple[Any, ...]]:
    """A row per method and query, then its `mean` over queries and all pairs `pooled`. Notes say
    the intervals of the means.
    """
    run, reporter, options = gradients.run, gradients.reporter, options_of(request)
    start, end = run.checkpoints[0], request.checkpoints[-1]
    trajectory = check(run, start, end)
    size = gradients.budget.batch_size("train", list(run.columns))
    replay = Replay(run, lambda ids: gradients.extractor.batch("train", ids)[0], size)
    replay.begin(start)
    for note in trajectory.notes:
        reporter.note(note)
    removals = sample(trajectory, range(start.step, end.step), options.removals, request.seed)
    if len(removals) < options.removals:
        reporter.note(
            f"--removals {options.removals}: examples and steps make {len(removals)}, all of them "
            "are removed"
        )
    predicted = {
        name: scores(gradients, METHODS[name], question, removals)
        for name, question in request.requests.items()
    }
    results = Results(
        request.folder / "evaluate" / f"tsloo-{digest(gradients, request, start, end)}.jsonl"
        if request.folder
        else None
    )
    retrain(gradients, replay, end, removals, request, results)
    base = next(record for record in results.records if "values" in record)
    done = truths(results)
    truth = np.array([done[removal] for removal in removals])
    noise = np.abs(np.array(base["again"]) - np.array(base["values"]))
    say(reporter, base, end, truth, noise)
    return rows(gradients, request, predicted, truth, noise)


def check(run: Run, start: Checkpoint, end: Checkpoint) -> Trajectory:
    """Raises TrajectoryError: no trajectory, or one that ends too early; UsageProblem where no step
    was recorded between the two.
    """
    trajectory = run.trajectory
    if trajectory is None:
        raise missing_trajectory("tsloo")
    if end.step > trajectory.steps:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {end.name}",
            f"it has the steps 0 to {trajectory.steps - 1:,}; a checkpoint of step "
            f"{trajectory.steps:,} is the last it can explain",
            "--steps leaves later checkpoints out; or the trajectory is of another run",
        )
    if end.step == start.step:
        raise UsageProblem(
            "no step lies between the first checkpoint of the run and the last one selected: both "
            f"are {end.name}",
            "expected: a checkpoint to train from and a later one, as those of step 0 and of the "
            "last step",
        )
    return trajectory


def sample(trajectory: Trajectory, steps: range, number: int, seed: int) -> list[Removal]:
    """The first `number` of one fixed order of all (step, example): more of them later are these
    and others.
    """
    members = [np.unique(trajectory.lines[step].examples) for step in steps]
    ends = np.cumsum([len(some) for some in members])
    if not len(ends) or not ends[-1]:
        raise UsageProblem(
            f"{trajectory.path.name}: steps {steps.start} to {steps.stop - 1} have no examples",
            "nothing can be left out",
        )
    removals = []
    for at in np.random.default_rng(seed).permutation(ends[-1])[:number]:
        line = int(np.searchsorted(ends, at, side="right"))
        removals.append(Removal(steps[line], int(members[line][at - ends[line]])))
    return removals


# ---------------------------------------------------------------- the truth
def digest(
    gradients: GradientSource, request: EvaluationRequest, start: Checkpoint, end: Checkpoint
) -> str:
    """What the truth depends on: of the training set only what the definition says of it."""
    run, settings = gradients.run, gradients.settings
    assert run.trajectory is not None
    assert request.folder is not None
    parts = [
        VERSION,
        run.definition.digest,
        hashlib.sha256(run.trajectory.path.read_bytes()).hexdigest(),
        checkpoint_key(start, request.folder / "checkpoints.json"),
        end.step,
        f"{settings.precision} {settings.mixed}",
        request.seed,
        options_of(request).renormalize,
        [int(query) for query in request.queries],
        run.query.digests(request.queries).tolist(),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def truths(results: Results) -> dict[Removal, list[float]]:
    """(Q,) the truth of each removal so far."""
    return {
        Removal(record["step"], record["example"]): record["truth"]
        for record in results.records
        if "truth" in record
    }


def retrain(
    gradients: GradientSource,
    replay: Replay,
    end: Checkpoint,
    removals: Sequence[Removal],
    request: EvaluationRequest,
    results: Results,
) -> None:
    """Adds to `results` what is missing: the whole run twice, then one run per removal, from its
    step on.
    """
    known = truths(results)
    todo = sorted(removal for removal in removals if removal not in known)
    base = next((record for record in results.records if "values" in record), None)
    step_count = end.step - gradients.run.checkpoints[0].step
    steps = (
        sum(end.step - removal.step for removal in todo)
        + (todo[-1].step if todo else 0)
        + (0 if base else 2 * step_count)
    )
    with gradients.reporter.progress("training again", steps) as advance:
        if base is None:
            base = baseline(gradients, replay, end, request, advance)
            results.add(base)
        replay.begin(gradients.run.checkpoints[0])
        here = replay.state()
        for number, removal in enumerate(todo, start=1):
            report_step = partial(advance, where=f"removal {number} of {len(todo)}")
            replay.go_to(here)
            replay.advance(removal.step, report_progress=report_step)
            here = replay.state()
            replay.advance(
                end.step,
                Drop(*removal, options_of(request).renormalize),
                base["max_norm"],
                report_progress=report_step,
            )
            truth = query_values(gradients, request.queries) - np.array(base["values"])
            results.add({"step": removal.step, "example": removal.example, "truth": truth.tolist()})


def baseline(
    gradients: GradientSource,
    replay: Replay,
    end: Checkpoint,
    request: EvaluationRequest,
    advance: Advance,
) -> dict[str, Any]:
    """The recorded run; `again`: the same with each batch backwards, clipped as removals are: apart
    by what is no effect.
    """
    start = gradients.run.checkpoints[0]
    replay.begin(start)
    replay.advance(end.step, report_progress=partial(advance, where="the whole run"))
    values, distance = query_values(gradients, request.queries), replay.relative_distance(end)
    max_norm = float(np.median(list(replay.clipped.values()))) if replay.clipped else None
    replay.begin(start)
    replay.advance(
        end.step,
        max_norm=max_norm,
        reverse=True,
        report_progress=partial(advance, where="the whole run again"),
    )
    again = query_values(gradients, request.queries)
    return {
        "values": values.tolist(),
        "again": again.tolist(),
        "apart": distance,
        "max_norm": max_norm,
    }


def query_values(gradients: GradientSource, queries: Ids) -> np.ndarray:
    """(Q,) m of each query as the model is now, float64. With autograd on: a loss may take
    derivatives of its own.
    """
    definition, size = (
        gradients.run.definition,
        gradients.budget.batch_size("train", list(gradients.run.columns)),
    )
    name = "measure" if definition.has("measure") else "loss"
    parts = []
    for first in range(0, len(queries), size):
        ids = np.array(queries[first : first + size])
        batch, _ = gradients.extractor.batch("query", ids)
        try:
            values = definition.raw(name)(gradients.run.model.module, batch)
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise InfluenceError(
                    f"out of memory in a batch of {len(ids)} queries",
                    "--batch-size N takes fewer at once",
                ) from error
            raise describe_failure(definition, name, error) from error
        if not isinstance(values, Tensor) or values.shape != (len(ids),):
            raise GradientError(
                f"{name}() did not return one number per query",
                f"expected: a tensor of shape ({len(ids)},)",
            )
        parts.append(values.detach().cpu().double().numpy())
    all_values = np.concatenate(parts)
    if not np.isfinite(all_values).all():
        query = int(np.asarray(queries)[~np.isfinite(all_values)][0])
        raise GradientError(
            f"training diverged when it was run again: {name}() of query {query} is not finite at "
            "its end",
            "look at the trajectory's lr, weights and clip: are they those of the run?",
        )
    return -all_values if name == "measure" else all_values


# ---------------------------------------------------------------- the table
def rows(
    gradients: GradientSource,
    request: EvaluationRequest,
    predicted: dict[str, np.ndarray],
    truth: np.ndarray,
    noise: np.ndarray,
) -> Iterator[tuple[Any, ...]]:
    """`mean`: of the rows above it. `pooled`: over all pairs at once; its noise is the root mean
    square.
    """
    queries, effects = [int(query) for query in request.queries], truth.std(axis=0)
    for method, scored in predicted.items():
        pairs_Q2 = np.array(
            [[spearman(a, b), pearson(a, b)] for a, b in zip(scored.T, truth.T, strict=True)]
        )
        good = pairs_Q2[~np.isnan(pairs_Q2).any(axis=1)]
        means = good.mean(axis=0) if len(good) else np.full(2, np.nan)
        if len(good) < len(queries):
            gradients.reporter.note(
                f"{method}: {len(queries) - len(good)} of {len(queries)} queries have no "
                "correlation, since the scores of all removals are "
                "equal there or their effects are; the means are over the others"
            )
        if len(good):
            spans = [
                f"{word} {mean:.3f} [{low:.3f}, {high:.3f}]"
                for word, mean, (low, high) in zip(
                    ("Spearman", "Pearson"),
                    means,
                    (interval(column, request.seed) for column in good.T),
                    strict=True,
                )
            ]
            gradients.reporter.note(
                f"{method}: {', '.join(spans)}: mean over {len(good)} queries and its 95 % "
                "interval (bootstrap over queries)"
            )
        for query, pair, effect, floor in zip(queries, pairs_Q2, effects, noise, strict=True):
            yield (
                method,
                str(query),
                *shown(pair),
                len(truth),
                float(effect),
                float(floor),
                gradients.run.query.label(query),
            )
        yield (
            method,
            "mean",
            *shown(means),
            len(truth),
            float(effects.mean()),
            float(noise.mean()),
            "",
        )
        pooled = spearman(scored.ravel(), truth.ravel()), pearson(scored.ravel(), truth.ravel())
        yield (
            method,
            "pooled",
            *shown(pooled),
            len(truth),
            float(truth.std()),
            root_mean_square(noise),
            "",
        )


def shown(values: Iterable[float]) -> list[float | None]:
    """Empty where there is no correlation."""
    return [None if np.isnan(value) else float(value) for value in values]


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values).mean()))


def say(
    reporter: Reporter,
    base: Mapping[str, Any],
    end: Checkpoint,
    truth: np.ndarray,
    noise: np.ndarray,
) -> None:
    """What of the truth should not be taken at its word."""
    distance_note = (
        f"the replay ends {base['apart']:.2g} of the way that training went from {end.name}"
    )
    if base["apart"] > FAR:
        distance_note += (
            ": it ran otherwise (dropout, BatchNorm, another machine or precision), and the truth "
            "is that of the replay"
        )
    reporter.note(distance_note)
    if base["max_norm"] is not None:
        reporter.note(
            "clipped steps: from a removal on, gradients are clipped at a norm of "
            f"{base['max_norm']:.4g}, the median of those recorded"
        )
    if 0 < truth.std() < ABOVE_NOISE * root_mean_square(noise):
        reporter.note(
            f"effects ({truth.std():.2g}) are hardly above the noise of training the same again "
            f"({root_mean_square(noise):.2g}): "
            "--precision float64 lowers it"
        )
