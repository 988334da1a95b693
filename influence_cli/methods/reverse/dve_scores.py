"""Scores of dve (methods/dve.py), in query form or in embedding form.

Query form: a reverse pass backpropagates the queries' gradients. Embedding form: it backpropagates
every coordinate of the final model, which gives the data value embedding of each occurrence. On
disk, embeddings answer any later query (embedding_store.py).

Letters: D numbers of all parameters.
"""

from collections.abc import Iterator
from pathlib import Path

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import TrajectoryError, UsageProblem, counted
from influence_cli.extraction.run_notes import sample_train_rows
from influence_cli.extraction.source import GradientSource, IdsAt
from influence_cli.methods.dve import DveOptions
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse.drift import fill_cache
from influence_cli.methods.reverse.embedding_build import build_embeddings
from influence_cli.methods.reverse.embedding_store import EmbeddingStore
from influence_cli.methods.reverse.fisher_steps import (
    CachedSteps,
    FisherStepBuilder,
    RecomputedSteps,
)
from influence_cli.methods.reverse.occurrences import NewSums, Sums, Trace
from influence_cli.methods.reverse.plan import build_plan
from influence_cli.methods.reverse.rank_sums import rank_scores, trace_scores
from influence_cli.methods.reverse.resume import PassProgress, open_progress
from influence_cli.methods.reverse.reverse_pass import (
    StepEffectsOf,
    adjoint_size,
    backpropagate,
    query_gradients,
    run_passes,
)
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.stability import Stability
from influence_cli.methods.reverse.steps import StepEffects, StepSource
from influence_cli.run.training_mode import uses_batch_statistics

MAP_BYTES = 2 << 30  # largest (D, D) map for which dve chooses the embedding form by itself


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of all requested training examples, ranked per query."""
    dve = Dve(source, request)
    yield from rank_scores(request, new_ranking, dve.plan, dve.run_passes)


def trace(source: GradientSource, request: ScoreRequest) -> Iterator[tuple[Ids, Trace]]:
    """Per pass its query ids (one with --sum-queries) and their scores over training time."""
    dve = Dve(source, request)
    yield from trace_scores(request, dve.plan, dve.run_passes)


def list_rows(source: GradientSource, request: ScoreRequest) -> list[IdsAt]:
    """The gradients of training examples that the reverse pass reads.

    Raises TrajectoryError where the reverse pass can't follow the recorded training.
    """
    plan = build_plan(source.run, request.checkpoints, request.columns)
    plan.trajectory.weights(plan.steps[-1])
    source.reporter.note(
        f"trajectory: {counted(len(plan.steps), 'step')} of {plan.trajectory.optimizer}, "
        f"{counted(plan.count_occurrences(), 'occurrence')}"
    )
    return list(plan.examples_by_checkpoint)


class Dve:
    """One request to dve: its plan, and its form.

    Raises TrajectoryError, UsageProblem: the plan does not fit the run or the flags.
    """

    def __init__(self, source: GradientSource, request: ScoreRequest) -> None:
        assert isinstance(request.options, DveOptions)
        self.source, self.request, self.options = source, request, request.options
        self.plan = self.plan_until(self.options.at)
        self.stability = Stability()
        self.check_projection()
        self.check_training_mode()

    def plan_until(self, at: int | None) -> ReversePlan:
        """The plan from the checkpoint of step `at`; None: from the last one."""
        request = self.request
        replay = self.options.replay
        return build_plan(self.source.run, request.checkpoints, request.columns, at, replay)

    def check_projection(self) -> None:
        if not self.source.settings.projection:
            return
        if self.plan.adam:
            raise UsageProblem(
                f"--project does not combine with {self.plan.trajectory.optimizer}: its steps "
                "scale each number of a gradient, and a projection does not keep them",
                "leave out --project, or use --method tracin",
            )
        if self.options.curvature != "none":
            self.source.reporter.note(
                "the curvature of projected gradients is biased: a larger --project K reduces the "
                "bias, --curvature none avoids it (docs/methods.md)"
            )

    def check_training_mode(self) -> None:
        """Raises TrajectoryError where no example had a gradient of its own; notes masks."""
        lines = self.plan.trajectory.lines
        modes = [line.training for line in lines if line.training is not None]
        if not modes:
            return
        if uses_batch_statistics(self.source.run.model.module, modes[0]):
            raise TrajectoryError(
                "training normalised with the statistics of each batch (BatchNorm in train mode), "
                "so an example had no gradient of its own",
                "dve needs gradients of single examples",
                "--method unroll --replay differentiates the losses inside their batches",
            )
        self.source.reporter.note(
            "training drew dropout masks; dve uses the gradients without masks. "
            "--method unroll --replay draws the masks of training"
        )

    def run_passes(self, new_sums: NewSums[Sums]) -> Iterator[tuple[Ids, Sums]]:
        """Raises CacheError (embeddings of another run), GradientError (divergence)."""
        return run_passes(self.source, self.request, self.plan, new_sums, self.prepare)

    def prepare(self, folder: Path) -> StepEffectsOf:
        if self.use_embeddings():
            store = self.ensure_embeddings(self.options.embeddings or folder / "embeddings")
            return lambda rows: store.step_effects(
                query_gradients(rows, self.plan, self.source.device), self.plan.end.step
            )
        curved = self.options.curvature != "none"
        builder = FisherStepBuilder(self.source, self.plan, curved, self.stability)
        if self.options.replay:
            plan = self.plan
            sample_train_rows(self.source, plan.segments[-1].checkpoint, list(plan.columns))
            # probes memory before the replay moves the model
            self.source.budget.sizes("train", list(plan.columns))
            return lambda rows: self.step_effects(rows, RecomputedSteps(builder))
        fill_cache(self.source, self.plan)
        return lambda rows: self.step_effects(rows, CachedSteps(builder))

    def ensure_embeddings(self, folder: Path) -> EmbeddingStore:
        """Embeddings of all steps: with --at they are read up to its step."""
        plan = self.plan if self.options.at is None else self.plan_until(None)
        store = EmbeddingStore(folder, self.source, plan, self.options)
        store.check_part_ends_at(self.plan.end.step)
        build_embeddings(store)
        return store

    def step_effects(self, rows: GradientRows, steps: StepSource) -> Iterator[StepEffects]:
        """The effects of each step in query form. Only a replay is worth saving."""
        progress = PassProgress(None, self.plan, self.source.reporter)
        if self.options.replay:
            by_layer = self.request.by == "layer"
            progress = open_progress(self.source, self.plan, rows, self.options, "dve", by_layer)
        renormalize = self.options.renormalize
        try:
            yield from backpropagate(
                self.source, self.request, self.plan, steps, progress, rows, renormalize
            )
        finally:
            if note := self.stability.note():
                self.source.reporter.note(note)

    def use_embeddings(self) -> bool:
        """Whether to use the embedding form, with a note.

        It takes fewer operations where the final model has fewer numbers than there are queries:
        4 D per occurrence and query, or 4 D per occurrence and number of the final model.
        """
        request, options = self.request, self.options
        queries = 1 if request.sum_queries else len(request.queries)
        size = adjoint_size(self.source, self.plan)
        requested = options.form == "embedding" or options.embeddings is not None
        is_cheaper = options.form is None and queries > size and size * size * 8 <= MAP_BYTES
        embedding = not options.replay and (requested or is_cheaper)
        if embedding and request.by == "layer":
            raise UsageProblem(
                "--by layer: embeddings are sums over the layers",
                "--form query splits scores by layer",
            )
        reason = f"embeddings in {options.embeddings}"
        if options.embeddings is None:
            reason = f"{counted(queries, 'query', 'queries')}, {size:,} numbers in the final model"
        self.source.reporter.note(
            f"dve in {'embedding' if embedding else 'query'} form ({reason}), curvature "
            f"{options.curvature}"
        )
        return embedding
