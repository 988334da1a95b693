"""The steps of dve: per-example gradients, with the batch's empirical Fisher as curvature.

The gradients come from the cache, at the checkpoint of each segment, or from a replay, at each
step's own parameters.

Letters: B entries of a batch.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.methods.reverse.fisher_batch import FisherBatch, make_dense
from influence_cli.methods.reverse.optimizer_adjoint import SgdUpdate, Update
from influence_cli.methods.reverse.replayed_steps import ReplayedSteps
from influence_cli.methods.reverse.segments import ReversePlan, Segment
from influence_cli.methods.reverse.stability import Stability
from influence_cli.methods.reverse.steps import PassSettings, ReverseStep
from influence_cli.run.trajectory import Trajectory

ROWS_BYTES = 1 << 30  # gradients of training examples in memory


@dataclass(frozen=True)
class FisherStepBuilder:
    """Builds steps from rows of gradients. `curved`: H is the empirical Fisher, else 0."""

    source: GradientSource
    plan: ReversePlan
    curved: bool
    stability: Stability

    def build_step(
        self, number: int, rows: GradientRows, updates: dict[str, Update], settings: PassSettings
    ) -> ReverseStep:
        """A step whose examples are among the rows."""
        line = self.plan.trajectory.lines[number]
        order = np.argsort(line.examples, kind="stable")
        examples = line.examples[order]
        places = np.searchsorted(rows.ids, examples)
        gradients = make_dense(select_forms(rows, places, self.source.device), settings.quantities)
        weights_B = torch.from_numpy(self.plan.trajectory.weights(number)[order]).to(
            self.source.device, settings.dtype
        )
        sgd = {name: update for name, update in updates.items() if isinstance(update, SgdUpdate)}
        if self.curved and len(sgd) == len(updates):
            traces_B = step_traces(rows, places, weights_B, sgd, line.clip)
            self.stability.check_step(number, traces_B, gradients, weights_B * line.clip, sgd)
        batch = FisherBatch(gradients, weights_B, gradients if self.curved else None)
        checkpoint = self.plan.segment_at(number).checkpoint.step
        return ReverseStep(number, checkpoint, examples, weights_B, batch, updates, line.clip)


@dataclass(frozen=True)
class CachedSteps:
    """A StepSource that reads the gradients of a plan from the cache."""

    builder: FisherStepBuilder

    def end_statistics(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None: dve refuses BatchNorm in train mode."""
        return {}

    def reversed_steps(self, stop: int, settings: PassSettings) -> Iterator[ReverseStep]:
        """The steps below `stop`, last first."""
        return self.steps_between(self.builder.plan.steps.start, stop, settings)

    def steps_between(self, first: int, stop: int, settings: PassSettings) -> Iterator[ReverseStep]:
        """The steps first..stop, last first. It reads at most about ROWS_BYTES at once."""
        source, plan = self.builder.source, self.builder.plan
        columns, lines = list(plan.columns), plan.trajectory.lines
        most = self.examples_in_memory(settings.dtype)
        for segment in reversed(plan.between(first, stop)):
            for steps in reversed(list(cut_steps(plan.trajectory, segment, most))):
                ids = np.unique(np.concatenate([lines[step].examples for step in steps]))
                if not len(ids):
                    continue
                units = list(source.read("train", segment.checkpoint, columns, ids))
                rows = move_rows(concat_rows(units), source.device, settings.dtype)
                for number in reversed(steps):
                    if len(lines[number].examples):
                        updates = plan.updates(number)
                        yield self.builder.build_step(number, rows, updates, settings)

    def examples_in_memory(self, dtype: torch.dtype) -> int:
        """How many examples' gradients fit into ROWS_BYTES, in the form that takes fewer bytes."""
        source, columns = self.builder.source, self.builder.plan.columns
        numbers = sum(map(source.settings.width, columns.values()))
        stored = source.budget.sizes("train", list(columns)).example_bytes(list(columns))
        return max(1, ROWS_BYTES // min(numbers * dtype.itemsize, 2 * stored))


@dataclass(frozen=True)
class RecomputedSteps:
    """A StepSource that computes the gradients of each batch during a replay, and drops them."""

    builder: FisherStepBuilder

    def end_statistics(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """None: dve refuses BatchNorm in train mode."""
        return {}

    def reversed_steps(self, stop: int, settings: PassSettings) -> Iterator[ReverseStep]:
        """The steps below `stop`, last first."""
        source, plan = self.builder.source, self.builder.plan
        replayed = ReplayedSteps(source, plan)
        for number, moments in replayed.reversed_states(stop):
            ids = np.unique(plan.trajectory.lines[number].examples)
            if len(ids) or moments:
                rows = source.extractor.rows(f"step {number}", "train", list(plan.columns), ids)
                rows = move_rows(rows, source.device, settings.dtype)
                updates = plan.updates(number, moments)
                yield self.builder.build_step(number, rows, updates, settings)
        replayed.report_agreement(source.reporter)


def move_rows(rows: GradientRows, device: torch.device, dtype: torch.dtype) -> GradientRows:
    """The rows on a device, in a precision."""
    forms = {name: form.to(device, dtype) for name, form in rows.forms.items()}
    return dataclasses.replace(rows, forms=forms)


def select_forms(rows: GradientRows, places: np.ndarray, device: torch.device) -> dict[str, Form]:
    """The gradients at these places of the rows; without a copy if they are all, in order."""
    if len(places) == len(rows.ids) and (places == np.arange(len(places))).all():
        return dict(rows.forms)
    at = torch.from_numpy(places).to(device)
    return {name: form.take(at) for name, form in rows.forms.items()}


def step_traces(
    rows: GradientRows,
    places: np.ndarray,
    weights_B: Tensor,
    updates: dict[str, SgdUpdate],
    clip: float,
) -> Tensor:
    """(B,) rate x w x |g|^2 of each entry: their sum is the trace of the step's rate x H."""
    norms_B = sum(
        (update.rate * rows.sqnorms[name][places] for name, update in updates.items()),
        torch.zeros(()),
    )
    return norms_B * weights_B.cpu() * clip


def cut_steps(trajectory: Trajectory, segment: Segment, most: int) -> Iterator[range]:
    """A segment's steps, in parts with at most `most` different examples, or of one step."""
    first, seen = segment.first, set(trajectory.lines[segment.first].examples.tolist())
    for step in range(segment.first + 1, segment.stop):
        union = seen.union(trajectory.lines[step].examples.tolist())
        if len(union) > most:
            yield range(first, step)
            first, union = step, set(trajectory.lines[step].examples.tolist())
        seen = union
    yield range(first, segment.stop)
