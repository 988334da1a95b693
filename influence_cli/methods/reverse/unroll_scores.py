"""Scores of unroll (methods/unroll.py): a reverse pass over steps with exact curvature."""

from collections.abc import Iterator
from pathlib import Path

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import counted, listed
from influence_cli.extraction.run_notes import sample_train_rows
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse.exact_steps import ExactSteps
from influence_cli.methods.reverse.occurrences import NewSums, Sums, Trace
from influence_cli.methods.reverse.plan import build_plan
from influence_cli.methods.reverse.rank_sums import rank_scores, trace_scores
from influence_cli.methods.reverse.resume import open_progress
from influence_cli.methods.reverse.reverse_pass import StepEffectsOf, backpropagate, run_passes
from influence_cli.methods.reverse.steps import StepEffects
from influence_cli.methods.reverse.unroll_cost import measure_cost
from influence_cli.methods.unroll import UnrollOptions


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of all requested training examples, ranked per query."""
    unroll = Unroll(source, request)
    yield from rank_scores(request, new_ranking, unroll.plan, unroll.run_passes)


def trace(source: GradientSource, request: ScoreRequest) -> Iterator[tuple[Ids, Trace]]:
    """Per pass its query ids (one with --sum-queries) and their scores over training time."""
    unroll = Unroll(source, request)
    yield from trace_scores(request, unroll.plan, unroll.run_passes)


def estimate_cost(source: GradientSource, request: ScoreRequest) -> str:
    """The cost in one line, for `influence inspect`: in trainings of the recorded steps."""
    cost = measure_cost(source, request, Unroll(source, request).steps)
    return cost.describe(
        "the mean query"
        if request.sum_queries
        else counted(len(request.queries), "query", "queries")
    )


class Unroll:
    """One request to unroll: its plan, and its steps.

    Raises TrajectoryError, UsageProblem (the plan does not fit the run or the flags),
    DefinitionError (missing functions).
    """

    def __init__(self, source: GradientSource, request: ScoreRequest) -> None:
        assert isinstance(request.options, UnrollOptions)
        self.source, self.request, self.options = source, request, request.options
        self.plan = build_plan(
            source.run,
            request.checkpoints,
            request.columns,
            self.options.at,
            self.options.replay,
            "unroll",
        )
        self.steps = ExactSteps(source, self.plan, self.options)

    def run_passes(self, new_sums: NewSums[Sums]) -> Iterator[tuple[Ids, Sums]]:
        """Raises GradientError: no second derivative, or divergence."""
        return run_passes(self.source, self.request, self.plan, new_sums, self.prepare)

    def prepare(self, folder: Path) -> StepEffectsOf:
        longest = max(segment.stop - segment.first for segment in self.plan.segments)
        if not self.options.replay and longest > 1:
            self.source.reporter.note(
                "all steps between two checkpoints use gradients and curvature at the first one "
                f"(here at most {longest:,} steps); --replay uses the parameters of each step"
            )
        plan = self.plan
        if self.steps.other_layers:
            self.source.reporter.note(
                f"BatchNorm layers {listed(self.steps.other_layers)} have untrained weights or no "
                "fixed momentum: scores leave out what a removal changes by their running "
                "statistics"
            )
        sample_train_rows(self.source, plan.segments[-1].checkpoint, list(plan.columns))
        self.steps.prepare()
        return self.step_effects

    def step_effects(self, rows: GradientRows) -> Iterator[StepEffects]:
        source, request, plan = self.source, self.request, self.plan
        by_layer = request.by == "layer"
        progress = open_progress(source, plan, rows, self.options, "unroll", by_layer)
        return backpropagate(
            source, request, plan, self.steps, progress, rows, self.options.renormalize
        )
