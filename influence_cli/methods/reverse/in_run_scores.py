"""Scores of in-run (methods/in_run.py): a replay, last step first.

Letters: B entries of a batch, K quantities: queries, or their mean; D numbers of a parameter.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import TrajectoryError
from influence_cli.extraction.run_notes import sample_train_rows
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.in_run import InRunOptions
from influence_cli.methods.pairwise import RankingFactory
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.methods.reverse.fisher_steps import FisherStepBuilder, move_rows
from influence_cli.methods.reverse.in_run_steps import Shares
from influence_cli.methods.reverse.occurrences import NewSums, Sums, Trace
from influence_cli.methods.reverse.plan import build_plan
from influence_cli.methods.reverse.rank_sums import rank_scores, trace_scores
from influence_cli.methods.reverse.removal_effects import removal_effects, sum_parameters
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.reverse_pass import (
    StepEffectsOf,
    parameters_of_layers,
    query_gradients,
    run_passes,
    working_dtype,
)
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.stability import Stability, check_finite
from influence_cli.methods.reverse.steps import (
    PassSettings,
    ReverseStep,
    StepEffects,
    split_products,
)
from influence_cli.run.replay import Replay
from influence_cli.run.training_mode import uses_batch_statistics

Gradients = dict[str, Tensor]  # (K, D) per parameter


def score(
    source: GradientSource, request: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of all requested training examples, ranked per query."""
    in_run = InRun(source, request)
    yield from rank_scores(request, new_ranking, in_run.plan, in_run.run_passes)


def trace(source: GradientSource, request: ScoreRequest) -> Iterator[tuple[Ids, Trace]]:
    """Per pass its query ids (one with --sum-queries) and their scores over training time."""
    in_run = InRun(source, request)
    yield from trace_scores(request, in_run.plan, in_run.run_passes)


class InRun:
    """One request to in-run.

    Raises TrajectoryError, UsageProblem: the plan does not fit the run or the flags.
    """

    def __init__(self, source: GradientSource, request: ScoreRequest) -> None:
        assert isinstance(request.options, InRunOptions)
        self.source, self.request, self.options = source, request, request.options
        self.plan = build_plan(
            source.run, request.checkpoints, request.columns, self.options.at, True, "in-run"
        )
        check_modes(source, self.plan)

    def run_passes(self, new_sums: NewSums[Sums]) -> Iterator[tuple[Ids, Sums]]:
        """Raises GradientError: a number that is not finite."""
        return run_passes(self.source, self.request, self.plan, new_sums, self.prepare)

    def prepare(self, folder: Path) -> StepEffectsOf:
        columns = list(self.plan.columns)
        sample_train_rows(self.source, self.plan.segments[-1].checkpoint, columns)
        self.source.budget.sizes("train", columns)
        return lambda rows: InRunPass(self, rows).step_effects()


def check_modes(source: GradientSource, plan: ReversePlan) -> None:
    """Raises TrajectoryError where no example had a gradient of its own; notes masks and Adam."""
    modes = [line.training for line in plan.trajectory.lines if line.training is not None]
    if modes and uses_batch_statistics(source.run.model.module, modes[0]):
        raise TrajectoryError(
            "training normalised with the statistics of each batch (BatchNorm in train mode), "
            "so an example had no gradient of its own",
            "in-run needs gradients of single examples",
            "--method unroll --replay differentiates the losses inside their batches",
        )
    if modes:
        source.reporter.note(
            "training drew dropout masks; in-run uses the gradients without masks, so scores do "
            "not sum to the fall of the query's loss"
        )
    if plan.adam:
        source.reporter.note(
            f"in-run holds the scale of {plan.trajectory.optimizer}'s updates fixed: an example's "
            "share is that of its gradient in the momentum"
        )


class InRunPass:
    """The queries of one pass, through all steps. `end`: their gradients at the end of training."""

    def __init__(self, in_run: InRun, end: GradientRows) -> None:
        self.source, self.plan = in_run.source, in_run.plan
        self.options, self.request = in_run.options, in_run.request
        self.dtype = working_dtype(end)
        self.ids = self.request.queries if self.request.sum_queries else end.ids
        self.later = query_gradients(end, self.plan, self.source.device)
        self.later_values = self._read_values(at_the_end=True) if self.options.points else {}
        self.end_losses = end.losses.double().cpu()
        moments = {name: torch.zeros_like(self.later[name]) for name in self.plan.with_momentum}
        self.shares = Shares(moments, torch.zeros(len(self.end_losses), dtype=torch.float64))
        by_layer = self.request.by == "layer"
        self.layers = parameters_of_layers(self.plan) if by_layer else {}

    def step_effects(self) -> Iterator[StepEffects]:
        """The effects of each step, last step first; then a note on what they sum to."""
        source, plan = self.source, self.plan
        columns = list(plan.columns)
        builder = FisherStepBuilder(source, plan, False, Stability())
        settings = PassSettings(len(self.end_losses), self.dtype, bool(self.layers))
        replayed = ReplayedSteps(source, plan)
        total_K = torch.zeros(len(self.end_losses), dtype=torch.float64)
        losses = self.end_losses
        for number, moments in replayed.reversed_states(plan.steps.stop):
            now, losses = self._query_rows(f"step {number}")
            ids = np.unique(plan.trajectory.lines[number].examples)
            if not len(ids):
                self.later = now
                continue
            rows = source.extractor.rows(f"step {number}", "train", columns, ids)
            rows = move_rows(rows, source.device, self.dtype)
            step = builder.build_step(number, rows, plan.updates(number, moments), settings)
            values = self._read_values() if self.options.points else {}
            theta = {
                name: source.run.model.module.get_parameter(name).detach().flatten().clone()
                for name in columns
            }
            effects = self._effects(step, self._way(number, now, values), theta)
            total_K = total_K + sum_parameters(effects.values).sum(0).double().cpu()
            yield effects
            self.later, self.later_values = now, values
        replayed.report_agreement(source.reporter)
        self._report_sums(replayed.replay, total_K, losses)

    def _effects(self, step: ReverseStep, way: Gradients, theta: Gradients) -> StepEffects:
        gradient = {name: value * step.clip for name, value in step.batch.gradient().items()}
        u = self.shares.reverse_step(way, step.updates, gradient, theta)
        products, _ = step.batch.through(u, dict.fromkeys(u, step.clip))
        values = {
            layer: removal_effects(sum_parameters(selected), step.weights)
            for layer, selected in split_products(products, self.layers).items()
        }
        for value in values.values():
            check_finite(value, step.number, step.checkpoint)
        return StepEffects(step.number, step.checkpoint, step.examples, values)

    # ------------------------------------------------------------ the queries' gradients
    def _query_rows(self, where: str) -> tuple[Gradients, Tensor]:
        """(K, D) per parameter at the model's weights, and (K,) the queries' losses."""
        columns = list(self.plan.columns)
        ids = np.asarray(self.ids, np.int64)
        rows = self.source.extractor.rows(where, "query", columns, ids)
        gradients = query_gradients(rows, self.plan, self.source.device)
        gradients = {name: value.to(self.dtype) for name, value in gradients.items()}
        losses = rows.losses.double().cpu()
        if not self.request.sum_queries:
            return gradients, losses
        means = {name: value.double().mean(0, keepdim=True) for name, value in gradients.items()}
        return {name: value.to(self.dtype) for name, value in means.items()}, losses.mean(
            0, keepdim=True
        )

    def _way(self, number: int, now: Gradients, values: Mapping[str, Tensor]) -> Gradients:
        """The queries' gradient on the way of a step. The model holds the start of the way."""
        if self.options.order == "1":
            return now
        if not self.options.points:
            return {name: (value + self.later[name]) / 2 for name, value in now.items()}
        nodes, weights = np.polynomial.legendre.leggauss(self.options.points)
        way: Gradients = {}
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            self._set_values(
                {n: v.lerp(self.later_values[n], float(node)) for n, v in values.items()}
            )
            gradients, _ = self._query_rows(f"step {number}")
            for name, value in gradients.items():
                way[name] = way[name] + weight * value if name in way else weight * value
        self._set_values(values)
        return way

    def _read_values(self, at_the_end: bool = False) -> dict[str, Tensor]:
        """Copies of the trained parameters, of the end of training or as they are."""
        model = self.source.run.model
        module = model.at(self.plan.end) if at_the_end else model.module
        return {name: module.get_parameter(name).detach().clone() for name in self.plan.columns}

    def _set_values(self, values: Mapping[str, Tensor]) -> None:
        model = self.source.run.model
        model.set_values([model.module.get_parameter(name) for name in values], values.values())

    # ------------------------------------------------------------ the note
    def _report_sums(self, replay: Replay, total_K: Tensor, losses: Tensor) -> None:
        """Note how the scores compare with the measured fall of the queries' losses."""
        fall_K = losses - self.end_losses
        parts = {"scores of all examples": total_K, "weight decay": self.shares.decay}
        first = self.plan.segments[0].checkpoint
        if first.step:
            parts["momentum from before"] = self.shares.falls_before(self._momenta_at(replay))
        gap_K = (sum(parts.values()) - fall_K).abs()
        shown = [(name, float(part.mean())) for name, part in parts.items()]
        sums = ", ".join(f"{name} {value:.4g}" for name, value in shown if value)
        share = float(gap_K.mean() / fall_K.abs().mean().clamp_min(1e-300))
        self.source.reporter.note(
            f"the queries' losses fell by {float(fall_K.mean()):.4g} on average; {sums}. "
            f"The mean difference is {share:.2%} of the mean fall"
        )

    def _momenta_at(self, replay: Replay) -> dict[str, Tensor]:
        """(D,) the momentum of each parameter at the first checkpoint."""
        replay.start_from(self.plan.segments[0].checkpoint)
        return {
            name: value for name, value in replay.momenta().items() if name in self.plan.columns
        }
