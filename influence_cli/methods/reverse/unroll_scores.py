"""Unroll: what leaving an example out of a step would have done, with the exact curvature of each
step's loss, from the model itself.

As in dve the score of z sums, over the steps t at which z was trained on, -w u_t . g_t(z), with u_t
the derivative of the query's loss at the end by the gradient of step t (adjoint.py); but H is the
Hessian of the step's loss, so that with every gradient taken where its step was (every step saved,
or `--replay`) the score is the exact derivative of really training again by the example's weight;
or Gauss-Newton's J^T S J, which has no negative curvature. Products come from the loss's own
derivatives (gradients/curvature.py): no gradient of a training example is formed, nothing but the
queries' is cached.

B entries of a batch, Q query.
"""

import copy
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import DefinitionError, GradientError, InfluenceError
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.curvature import Curvature, Functions
from influence_cli.gradients.curvature_check import check_curvature
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse import occurrences, reverse_pass
from influence_cli.methods.reverse.occurrences import New, Sums, Totals, Trace
from influence_cli.methods.reverse.optimizer_adjoint import AnyUpdate, Pull
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.segments import plan
from influence_cli.methods.reverse.steps import ReverseStep
from influence_cli.methods.unroll import UnrollOptions
from influence_cli.progress import Advance, format_bytes, format_duration
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.replay import Moments, Replay

DIRECTION_BYTES = (
    256 << 20
)  # working memory of queries that are taken through a batch's curvature at once
OUTPUTS = ("outputs", "loss_from_outputs")


def score(
    gradients: GradientSource, question: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every training example asked for, ranked per query."""
    work = Unroll(gradients, question)
    yield from occurrences.score(question, new_ranking, work.plan, work.passes)


def trace(gradients: GradientSource, question: ScoreRequest) -> Iterator[tuple[Ids, Trace]]:
    """Per pass the queries' ids (one, with --sum-queries) and their scores over training time, of
    all steps and of `question.train`.
    """
    work = Unroll(gradients, question)
    yield from occurrences.trace(question, work.plan, work.passes)


@dataclass(frozen=True)
class Cost:
    """Of one question, measured on one of its steps. `step`: seconds of the plain training step,
    `back`: of the same step back, with the queries of one pass; `memory`: bytes of the query
    gradients.
    """

    steps: int
    passes: int
    step: float
    back: float
    replay: bool
    memory: int

    @property
    def runs(self) -> float:
        """In trainings of these steps."""
        return self.passes * (self.back / self.step + self.replay)

    @property
    def seconds(self) -> float:
        return self.steps * self.step * self.runs


def cost(gradients: GradientSource, question: ScoreRequest) -> Cost:
    """What `score` would take, from a few runs of the step in the middle at the first
    checkpoint.
    """
    unroll = Unroll(gradients, question)
    plan, columns = unroll.plan, list(unroll.plan.columns)
    gradients.run.model.at(plan.segments[0].checkpoint)
    gradients.budget.sizes("train", columns)
    number = plan.steps[len(plan.steps) // 2]
    examples, weights = (
        plan.trajectory.lines[number].examples,
        torch.from_numpy(plan.trajectory.weights(number)),
    )
    wide = torch.float64 if gradients.settings.store == torch.float64 else torch.float32
    weights = weights.to(gradients.device, wide)
    most = reverse_pass.queries_of_a_pass(gradients, plan, question)
    width = 1 if question.sum_queries else min(most, len(question.queries))
    u = {
        name: torch.randn(width, column.numel, dtype=wide, device=gradients.device)
        for name, column in plan.columns.items()
    }
    replay = Replay(
        gradients.run,
        lambda ids: gradients.extractor.batch("train", ids)[0],
        gradients.budget.requested_batch_size,
    )

    def timed(work: Callable[[], object]) -> float:
        work()
        times = []
        for _ in range(3):
            started = time.perf_counter()
            work()
            times.append(time.perf_counter() - started)
        return min(times)

    def back() -> None:
        parts = unroll.curvature(examples, weights, width)
        ExactBatch(parts, wide, question.by == "layer").through(u, dict.fromkeys(u, 1.0))

    return Cost(
        len(plan.steps),
        1 if question.sum_queries else -(-len(question.queries) // most),
        timed(lambda: replay.gradient(number)),
        timed(back),
        unroll.options.replay,
        3 * width * reverse_pass.numbers(gradients, plan) * wide.itemsize,
    )


def estimate_cost(gradients: GradientSource, question: ScoreRequest) -> str:
    """The cost in one line, for `influence inspect`: in trainings of the recorded steps."""
    measured = cost(gradients, question)
    queries = "the mean query" if question.sum_queries else f"{len(question.queries):,} queries"
    replays = f", {measured.passes} of them to re-run the steps" if measured.replay else ""
    return (
        f"about {measured.runs:.1f} trainings of its {measured.steps:,} steps for {queries}"
        f"{replays}: {format_duration(measured.seconds)} ({measured.step * 1e3:.3g} ms a step, "
        f"{measured.back * 1e3:.3g} ms back), {format_bytes(measured.memory)} in memory"
    )


class ExactBatch:
    """A step's batch by the derivatives of its own loss (adjoint.Batch). `apart`: products by
    parameter, a pass for each; else as one.
    """

    def __init__(
        self, parts: Sequence[Callable[[], Curvature]], wide: torch.dtype, by_parameter: bool
    ) -> None:
        """`parts` make the curvature of each part of the batch, in order; a single one is made
        once, more are made each time.
        """
        only = parts[0]() if len(parts) == 1 else None
        self._parts = parts if only is None else [lambda: only]
        self._wide, self._apart = wide, by_parameter
        self._gradient: dict[str, Tensor] = {}
        for make in self._parts:
            for name, value in make().gradient().items():
                self._gradient[name] = (
                    self._gradient[name] + value.to(wide)
                    if name in self._gradient
                    else value.to(wide)
                )

    @property
    def names(self) -> Collection[str]:
        return self._gradient.keys()

    def gradient(self) -> Mapping[str, Tensor]:
        return self._gradient

    def through(
        self, u: Mapping[str, Tensor], scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], Pull]:
        scaled = {
            name: value if scale[name] == 1 else value * scale[name] for name, value in u.items()
        }
        parts: list[dict[str, Tensor]] = []
        sums: dict[str, Tensor] = {}
        for make in self._parts:
            products, pull = make().through(scaled, self._apart)
            parts.append(products)
            for name, value in pull.items():
                sums[name] = (
                    sums[name] + value.to(self._wide) if name in sums else value.to(self._wide)
                )
        zero = torch.zeros_like(next(iter(parts[0].values())))
        names = dict.fromkeys(name for products in parts for name in products)
        joined = {
            name: torch.cat(
                [
                    products.get(name, zero[: len(next(iter(products.values())))])
                    for products in parts
                ]
            )
            for name in names
        }

        def pull_into(name: str, theta: Tensor) -> None:
            theta.add_(sums[name])

        return {name: value.to(self._wide) for name, value in joined.items()}, pull_into


class Unroll:
    """One question to unroll: what is gone back over, and where gradients are taken."""

    def __init__(self, gradients: GradientSource, question: ScoreRequest) -> None:
        """Raises TrajectoryError, UsageProblem (the plan does not fit the run or the flags),
        DefinitionError (functions that lack).
        """
        self.gradients, self.question = gradients, question
        assert isinstance(question.options, UnrollOptions)
        self.options = question.options
        definition, needed = (
            gradients.run.definition,
            OUTPUTS if self.options.curvature == "gauss-newton" else (),
        )
        if lacking := [name for name in needed if not definition.has(name)]:
            raise DefinitionError(
                f"{definition.path.name} lacks {' and '.join(f'{name}()' for name in lacking)}",
                "--curvature gauss-newton takes the loss in two parts: outputs(model, batch) and "
                "loss_from_outputs(outputs, batch)",
                "--curvature hessian needs loss() only",
            )
        self.functions = Functions(*map(definition.raw, ("loss", *needed)))
        self.together = True  # queries go through a step's curvature together, where that is small
        self.plan = plan(
            gradients.run,
            question.checkpoints,
            question.columns,
            self.options.at,
            self.options.replay,
            "unroll",
        )

    def passes(self, new: New[Sums]) -> Iterator[tuple[Ids, Sums]]:
        """Raises GradientError (no second derivative; what is carried back runs away)."""
        return reverse_pass.passes(self.gradients, self.question, self.plan, new, self.work)

    def work(self, folder: Path) -> reverse_pass.Work:
        longest = max(segment.stop - segment.first for segment in self.plan.segments)
        if not self.options.replay and longest > 1:
            self.gradients.reporter.note(
                f"up to {longest:,} steps have the gradients and curvature of the checkpoint "
                "before them; --replay takes each where it was"
            )
        self.gradients.run.model.at(self.plan.segments[0].checkpoint)
        self.check()
        self.gradients.budget.sizes(
            "train", list(self.plan.columns)
        )  # probed before the model is moved
        return self.carry

    def carry(self, rows: GradientRows, totals: Totals | Trace, advance: Advance) -> None:
        kept = reverse_pass.PassProgress(self.gradients, self.plan, self.options, "unroll")
        reverse_pass.carry(
            self.gradients, self.plan, self.options, rows, totals, self.take, kept, advance
        )

    def take(
        self, width: int, wide: torch.dtype, stop: int, by_parameter: bool
    ) -> Iterator[ReverseStep]:
        for number, checkpoint, moments in self.places(stop):
            line = self.plan.trajectory.lines[number]
            order = np.argsort(line.examples, kind="stable")
            if not len(order) and moments is None:
                continue
            weights = torch.from_numpy(self.plan.trajectory.weights(number)[order]).to(
                self.gradients.device, wide
            )
            parts = self.curvature(line.examples[order], weights, width)
            updates: dict[str, AnyUpdate] = self.plan.updates(number, moments)
            yield ReverseStep(
                number,
                checkpoint,
                line.examples[order],
                weights,
                ExactBatch(parts, wide, by_parameter),
                updates,
            )

    def curvature(
        self, ids: np.ndarray, weights: Tensor, width: int
    ) -> list[Callable[[], Curvature]]:
        """What makes the curvature of a batch's loss with the parameters that the model has, part
        by part of the batch.
        """
        gradients, columns = self.gradients, list(self.plan.columns)
        size, example_bytes = (
            gradients.budget.batch_size("train", columns),
            gradients.budget.sizes("train", columns).working_bytes(columns),
        )
        most = (
            1
            if not self.together
            else max(1, min(width, DIRECTION_BYTES // max(1, example_bytes * min(size, len(ids)))))
        )

        def make(some: slice) -> Curvature:
            batch, _ = gradients.extractor.batch("train", ids[some])
            try:
                return Curvature(
                    gradients.run.model.module,
                    columns,
                    self.functions,
                    batch,
                    weights[some],
                    most,
                    self.alone,
                )
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                raise gradients.extractor.explained("train", error, len(ids[some])) from error

        return [
            partial(make, slice(first, first + size)) for first in range(0, max(1, len(ids)), size)
        ]

    def alone(self, why: str) -> None:
        self.together = False
        self.gradients.reporter.note(
            "queries go back over steps one at a time, the same but slower: vmap can't batch this "
            f"model ({why})"
        )

    def check(self) -> None:
        """Compare the curvature of a few training examples with differences of gradients, on a copy
        of the model in float64.

        Raises GradientError where they differ; a note where the model does not run in float64.
        """
        ids = np.arange(min(4, len(self.gradients.run.train)))
        try:
            model = copy.deepcopy(self.gradients.run.model.module).double()
            batch, _ = self.gradients.extractor.batch("train", ids, torch.float64)
            check_curvature(model, list(self.plan.columns), self.functions, batch, len(ids))
        except GradientError:
            raise
        # whatever a model does that float64 or a copy can't; the work itself is another matter
        except Exception as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
            self.gradients.reporter.note(
                "curvature was not compared with differences of gradients, which takes a copy in "
                f"float64 ({what})"
            )

    def places(self, stop: int) -> Iterator[tuple[int, Checkpoint, dict[str, Moments] | None]]:
        """The steps below `stop`, last first; the model stands where the gradients of each are
        taken.
        """
        if self.options.replay:
            replayed = ReplayedSteps(self.gradients, self.plan)
            yield from replayed.back(stop)
            self.gradients.reporter.note(replayed.note())
            return
        for segment in reversed(self.plan.between(self.plan.steps.start, stop)):
            self.gradients.run.model.at(segment.checkpoint)
            for number in reversed(range(segment.first, segment.stop)):
                yield number, segment.checkpoint, None
