"""DVE: data value embedding (Wang et al. 2024, arXiv:2412.09538), trajectory-specific leave-one-out
from saved checkpoints.

score(z, q) sums, over the steps t at which z was trained on, -w u_t . g_t(z), with u_t the
derivative of the query's loss at the end by the gradient of step t (adjoint.py). For plain SGD this
is the paper's w eta g_t(z)^T prod_k (I - eta H_k) grad m(theta_T, q). Score > 0: proponent, without
z at that step the query's loss had ended higher, by about the score.

Query form: the queries' gradients are carried back, nothing of size p x p. Embedding form: every
coordinate of the end is carried back, which gives the data value embedding of each occurrence; kept
on disk it answers any later query (embeddings.py).

N train, Q query, M occurrences, P parts of a score, p numbers of all parameters.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import UsageProblem
from influence_cli.extraction.source import GradientSource, IdsAt
from influence_cli.methods.dve import DveOptions
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse import occurrences, reverse_pass
from influence_cli.methods.reverse.embedding_store import STATE_BYTES, Embeddings
from influence_cli.methods.reverse.occurrences import New, Sums, Totals, Trace
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.segments import ReversePlan, plan
from influence_cli.methods.reverse.steps import Fisher, ReverseStep, Stability, prepare
from influence_cli.progress import Advance


def score(
    gradients: GradientSource, question: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every training example asked for, ranked per query."""
    work = Dve(gradients, question)
    yield from occurrences.score(question, new_ranking, work.plan, work.passes)


def trace(
    gradients: GradientSource, question: ScoreRequest
) -> Iterator[tuple[Ids, occurrences.Trace]]:
    """Per pass the queries' ids (one, with --sum-queries) and their scores over training time, of
    all steps and of `question.train`.
    """
    work = Dve(gradients, question)
    yield from occurrences.trace(question, work.plan, work.passes)


def list_rows(gradients: GradientSource, question: ScoreRequest) -> list[IdsAt]:
    """The gradients of training examples that the reverse pass reads.

    Raises TrajectoryError where the recorded training can't be followed backwards.
    """
    reverse_plan = plan(gradients.run, question.checkpoints, question.columns)
    reverse_plan.trajectory.weights(reverse_plan.steps[-1])
    gradients.reporter.note(
        f"trajectory: {len(reverse_plan.steps):,} steps of {reverse_plan.trajectory.optimizer}, "
        f"{reverse_plan.occurrences():,} occurrences"
    )
    return list(reverse_plan.wanted)


class Dve:
    """One question to data value embedding: what is gone back over, and in which form."""

    def __init__(self, gradients: GradientSource, question: ScoreRequest) -> None:
        """Raises TrajectoryError, UsageProblem (the plan does not fit the run or the flags)."""
        self.gradients, self.question = gradients, question
        assert isinstance(question.options, DveOptions)
        self.options = question.options
        self.plan = self._plan(self.options.at)
        self.stability = Stability()
        if gradients.settings.projection and self.plan.adam:
            raise UsageProblem(
                f"--project with {self.plan.trajectory.optimizer}: its steps are taken number by "
                "number, which a projection has not",
                "leave out --project, or use --method tracin",
            )
        if gradients.settings.projection and self.options.curvature != "none":
            gradients.reporter.note(
                "the curvature of projected gradients is biased, the less the larger --project K "
                "is (docs/methods.md); "
                "--curvature none is not"
            )

    def _plan(self, at: int | None) -> ReversePlan:
        return plan(
            self.gradients.run,
            self.question.checkpoints,
            self.question.columns,
            at,
            self.options.replay,
        )

    def passes(self, new: New[Sums]) -> Iterator[tuple[Ids, Sums]]:
        """Raises CacheError (embeddings of something else), GradientError (what is carried back
        runs away).
        """
        return reverse_pass.passes(self.gradients, self.question, self.plan, new, self.work)

    def work(self, folder: Path) -> reverse_pass.Work:
        if self.embedded():
            full_plan = self.plan if self.options.at is None else self._plan(None)
            kept = Embeddings(
                self.options.embeddings or folder / "embeddings",
                self.gradients,
                full_plan,
                self.plan.end.step,
                self.options,
            )
            kept.ensure()
            return lambda rows, totals, advance: self.read(kept, rows, totals, advance)
        take = self.cached
        if self.options.replay:
            self.gradients.budget.sizes(
                "train", list(self.plan.columns)
            )  # probed before the model is moved
            take = self.replayed
        else:
            prepare(self.gradients, self.plan)
        return lambda rows, totals, advance: self.carry(rows, totals, take, advance)

    def read(
        self, kept: Embeddings, rows: GradientRows, totals: Totals | Trace, advance: Advance
    ) -> None:
        for step, checkpoint, examples, effects in kept.scores(
            reverse_pass.dense(rows, self.plan, self.gradients.device), advance
        ):
            totals.add(step, str(checkpoint), examples, {"": effects})

    def carry(
        self, rows: GradientRows, totals: Totals | Trace, take: reverse_pass.Take, advance: Advance
    ) -> None:
        kept = reverse_pass.PassProgress(
            self.gradients if self.options.replay else None, self.plan, self.options, "dve"
        )
        try:
            reverse_pass.carry(
                self.gradients, self.plan, self.options, rows, totals, take, kept, advance
            )
        finally:
            if self.stability.note():
                self.gradients.reporter.note(str(self.stability.note()))

    def fisher(self, width: int, wide: torch.dtype) -> Fisher:
        return Fisher(
            self.gradients, self.plan, width, wide, self.options.curvature != "none", self.stability
        )

    def cached(
        self, width: int, wide: torch.dtype, stop: int, by_parameter: bool
    ) -> Iterator[ReverseStep]:
        return self.fisher(width, wide).cached(self.plan.between(self.plan.steps.start, stop))

    def replayed(
        self, width: int, wide: torch.dtype, stop: int, by_parameter: bool
    ) -> Iterator[ReverseStep]:
        """The gradients of each step's batch are taken when the replay stands there, and not
        kept.
        """
        fisher, replayed = self.fisher(width, wide), ReplayedSteps(self.gradients, self.plan)
        for number, checkpoint, moments in replayed.back(stop):
            ids = np.unique(self.plan.trajectory.lines[number].examples)
            if len(ids) or moments:
                rows = fisher.keep_on_device(
                    self.gradients.extractor.rows(
                        f"step {number}", "train", list(self.plan.columns), ids
                    )
                )
                yield fisher.step(number, checkpoint, rows, self.plan.updates(number, moments))
        self.gradients.reporter.note(replayed.note())

    def embedded(self) -> bool:
        """Whether the embedding form is taken; says so. Fewer operations: 4 p an occurrence and
        query, or coordinate of the end.
        """
        question, options = self.question, self.options
        queries, size = (
            1 if question.sum_queries else len(question.queries),
            reverse_pass.numbers(self.gradients, self.plan),
        )
        if options.replay:
            cheaper = False
        elif options.form is None and options.embeddings is None:
            cheaper = queries > size and size * size * 8 <= STATE_BYTES
        else:
            cheaper = options.form == "embedding" or options.embeddings is not None
        if cheaper and question.by == "layer":
            raise UsageProblem(
                "--by layer: embeddings are sums over the layers",
                "--form query splits scores by layer",
            )
        why = (
            f"{queries:,} {'query' if queries == 1 else 'queries'}, {size:,} numbers of parameters"
            if options.embeddings is None
            else f"kept in {options.embeddings}"
        )
        self.gradients.reporter.note(
            f"dve in {'embedding' if cheaper else 'query'} form ({why}), curvature "
            f"{options.curvature}"
        )
        return cheaper
