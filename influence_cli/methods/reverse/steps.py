"""From the end of training back to its beginning: the recorded steps in reverse order, each with
its batch's gradients.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.errors import GradientError
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import distance
from influence_cli.gradients.forms import Form
from influence_cli.methods.pairwise import dtype_of
from influence_cli.methods.reverse.optimizer_adjoint import (
    Adjoint,
    AnyUpdate,
    Batch,
    FisherBatch,
    Update,
    densely,
    effects,
    gram,
    total,
)
from influence_cli.methods.reverse.segments import ReversePlan, Segment
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.trajectory import Trajectory

ROWS_BYTES = 1 << 30  # gradients of training examples held at once
GROWTH = 1e4  # of a derivative over training: past it the recursion has run away
DRIFT_SEGMENTS, DRIFT_EXAMPLES = 16, 8


def prepare(gradients: GradientSource, plan: ReversePlan) -> None:
    """Take and keep the gradients that are missing, each segment's of its own examples; say how far
    its frozen ones can be trusted.
    """
    gradients.ensure_each("train", plan.wanted, list(plan.columns))
    if (cosines := drift(gradients, plan)) is not None:
        gradients.reporter.note(cosines)


# ---------------------------------------------------------------- the way back
@dataclass
class StepProducts:
    """What came of one step back: per parameter (B, K) the product of each entry's gradient with
    u.
    """

    number: int
    checkpoint: Checkpoint
    examples: np.ndarray  # (B,) rising
    weights: Tensor
    products: dict[str, Tensor]

    def effects(self, renormalize: bool, names: Sequence[str] | None = None) -> Tensor:
        """(B, K) what leaving out each entry would have done, by the gradients of these parameters
        or all.
        """
        entry_of = (
            torch.from_numpy(np.unique(self.examples, return_inverse=True)[1]).to(
                self.weights.device
            )
            if renormalize
            else None
        )
        nothing = torch.zeros_like(
            next(iter(self.products.values()))
        )  # of a parameter that the step's loss did not depend on
        totals = total({name: self.products.get(name, nothing) for name in names or self.products})
        return effects(totals, self.weights, entry_of)


class Stability:
    """Watches the curvature of each step and the size of what is carried back."""

    def __init__(self) -> None:
        self.worst: list[
            tuple[float, int]
        ] = []  # (share of the limit, step) of the steps at or past it

    def curvature(
        self,
        step: int,
        norms: Tensor,
        gradients: Mapping[str, Form],
        weights: Tensor,
        updates: dict[str, Update],
    ) -> None:
        """The largest eigenvalue of the step's whole rate x H against what such steps bear. `norms`
        (B,): its trace often settles it.
        """
        limit = min(update.stable for update in updates.values())
        if float(norms.sum()) >= limit:
            largest = top_eigenvalue(gram(gradients, weights, updates))
            if largest >= limit:
                self.worst.append((largest / limit, step))

    def note(self) -> str | None:
        if not self.worst:
            return None
        share, step = max(self.worst)
        return (
            f"{len(self.worst)} steps are unstable: at step {step} the curvature is {share:.3g} "
            "times what its size bears, so that "
            "what came before it is blown up; checkpoints closer together help, as gradients of "
            "one stand for all steps to the next"
        )


def top_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric matrix without negative eigenvalues, by power iteration."""
    vector = matrix.sum(1) + matrix.diagonal()
    eigenvalue = 0.0
    for _ in range(1000):
        size = float(vector.norm())
        if not 0 < size < float("inf"):
            return size
        last, vector = eigenvalue, matrix @ (vector / size)
        eigenvalue = float(vector.norm())
        if abs(eigenvalue - last) < 1e-6 * eigenvalue:
            break
    return eigenvalue


@dataclass
class ReverseStep:
    """A step and its batch, with its gradients where they are taken."""

    number: int
    checkpoint: Checkpoint
    examples: np.ndarray  # (B,) rising
    weights: Tensor
    batch: Batch
    updates: dict[str, AnyUpdate]


def back(
    steps: Iterable[ReverseStep], plan: ReversePlan, adjoint: Adjoint, start: Tensor
) -> Iterator[StepProducts]:
    """The steps, last first. `start` (K,): the norms of what is carried at the end of training.

    Raises GradientError where what is carried back runs away.
    """
    for step in steps:
        products = adjoint.step(step.batch, step.updates, plan.trajectory.lines[step.number].clip)
        yield StepProducts(step.number, step.checkpoint, step.examples, step.weights, products)
        check_growth(start, sizes(adjoint), step.number)


@dataclass
class Fisher:
    """Steps with per-example gradients, and with the empirical Fisher of each batch as H where
    `curved`. `width`: how many are carried.
    """

    gradients: GradientSource
    plan: ReversePlan
    width: int
    wide: torch.dtype
    curved: bool
    stability: Stability

    def cached(self, segments: tuple[Segment, ...]) -> Iterator[ReverseStep]:
        """The steps of these segments, last first, with the cached gradients of each one's
        checkpoint. Memory: ROWS_BYTES of gradients.
        """
        columns, trajectory = list(self.plan.columns), self.plan.trajectory
        row_bytes = (
            sum(map(self.gradients.settings.width, self.plan.columns.values())) * self.wide.itemsize
        )
        stored = self.gradients.budget.sizes("train", columns).example_bytes(columns)
        for segment in reversed(segments):
            for steps in reversed(
                list(chunks(trajectory, segment, max(1, ROWS_BYTES // min(row_bytes, 2 * stored))))
            ):
                ids = np.unique(np.concatenate([trajectory.lines[step].examples for step in steps]))
                if not len(ids):
                    continue
                rows = self.keep_on_device(
                    concat_rows(
                        list(self.gradients.read("train", segment.checkpoint, columns, ids))
                    )
                )
                for number in reversed(steps):
                    if len(trajectory.lines[number].examples):
                        yield self.step(number, segment.checkpoint, rows, self.plan.updates(number))

    def keep_on_device(self, rows: GradientRows) -> GradientRows:
        """On the device, in the precision of what is carried."""
        return dataclasses.replace(
            rows,
            forms={
                name: form.to(self.gradients.device, self.wide) for name, form in rows.forms.items()
            },
        )

    def step(
        self, number: int, checkpoint: Checkpoint, rows: GradientRows, updates: dict[str, AnyUpdate]
    ) -> ReverseStep:
        """A step whose examples are among the rows."""
        line = self.plan.trajectory.lines[number]
        order = np.argsort(line.examples, kind="stable")
        examples = line.examples[order]
        place = np.searchsorted(rows.ids, examples)
        at = torch.from_numpy(place).to(self.gradients.device)
        is_complete = len(place) == len(rows.ids) and (place == np.arange(len(place))).all()
        batch = densely(
            rows.forms
            if is_complete
            else {name: form.take(at) for name, form in rows.forms.items()},
            self.width,
        )
        weights = torch.from_numpy(self.plan.trajectory.weights(number)[order]).to(
            self.gradients.device, self.wide
        )
        plain = {name: update for name, update in updates.items() if isinstance(update, Update)}
        if self.curved and len(plain) == len(updates):
            self.stability.curvature(
                number,
                step_sizes(rows, place, weights, plain, line.clip),
                batch,
                weights * line.clip,
                plain,
            )
        return ReverseStep(
            number,
            checkpoint,
            examples,
            weights,
            FisherBatch(batch, weights, batch if self.curved else None),
            updates,
        )


def chunks(trajectory: Trajectory, segment: Segment, most: int) -> Iterator[range]:
    """A segment's steps, cut so that each cut has at most `most` different examples, or is one
    step.
    """
    first, seen = segment.first, set(trajectory.lines[segment.first].examples.tolist())
    for step in range(segment.first + 1, segment.stop):
        more = seen.union(trajectory.lines[step].examples.tolist())
        if len(more) > most:
            yield range(first, step)
            first, more = step, set(trajectory.lines[step].examples.tolist())
        seen = more
    yield range(first, segment.stop)


def step_sizes(
    rows: GradientRows, place: np.ndarray, weights: Tensor, updates: dict[str, Update], clip: float
) -> Tensor:
    """(B,) rate x w x |g|^2 of each entry: their sum is the trace of the step's rate x H."""
    norms = sum(
        (update.rate * rows.sqnorms[name][place] for name, update in updates.items()),
        torch.zeros(()),
    )
    return norms * weights.cpu() * clip


def sizes(adjoint: Adjoint) -> Tensor:
    """(K,) the norm of what is carried of each quantity."""
    states = (
        adjoint.theta,
        {} if adjoint.second else adjoint.moment,
    )  # with Adam a_m is divided by gradients, and of another size
    squares = [value.norm(dim=1).square() for state in states for value in state.values()]
    return torch.stack(squares).sum(0).sqrt().cpu()


def check_growth(start: Tensor, now: Tensor, step: int) -> None:
    bad = ~(now <= GROWTH * start)
    if bad.any():
        growth = float((now[bad] / start[bad])[0])
        raise GradientError(
            f"backpropagating through training diverged at step {step}: the query gradient grew "
            f"{growth:,.0f}-fold",
            "all steps between two checkpoints use gradients of the first one, and the learning "
            "rate can be too large for that",
            "use --replay, save checkpoints closer together, or begin later (--steps)",
        )


# ---------------------------------------------------------------- how far it can be trusted
def drift(gradients: GradientSource, plan: ReversePlan) -> str | None:
    """How much gradients change between neighbouring checkpoints, from some examples of some
    segments; None where each step is saved.
    """
    following = [*(segment.checkpoint for segment in plan.segments[1:]), plan.end]
    frozen = [
        (segment, after)
        for segment, after in zip(plan.segments, following, strict=True)
        if segment.stop - segment.first > 1 and after != segment.checkpoint
    ]
    cosines: list[tuple[float, Segment]] = []
    columns = list(plan.columns)
    for segment, after in (frozen[k] for k in spread_evenly(len(frozen), DRIFT_SEGMENTS)):
        examples = plan.examples(segment)
        ids = examples[spread_evenly(len(examples), DRIFT_EXAMPLES)]
        gradients.ensure("train", [after], columns, ids)
        before, then = (
            concat_rows(list(gradients.read("train", c, columns, ids)))
            for c in (segment.checkpoint, after)
        )
        first_values, second_values = (
            torch.stack([rows.sqnorms[name] for name in columns]).sum(0) for rows in (before, then)
        )
        angles = torch.stack(
            [distance(before.forms[name], then.forms[name]).square() for name in columns]
        ).sum(0)
        cosine = (first_values + second_values - angles) / (
            2 * (first_values * second_values).sqrt()
        )
        cosines += [
            (float(value), segment) for value in cosine if value == value
        ]  # a zero gradient has no direction
    if not cosines:
        return None
    least, where = min(cosines, key=lambda pair: pair[0])
    middle = float(np.median([value for value, _ in cosines]))
    return (
        "drift: the same examples' gradients at neighbouring checkpoints have a median cosine of "
        f"{middle:.2f}, the least {least:.2f} "
        f"(after step {where.checkpoint.step:,}); steps between are given the gradients of the "
        "checkpoint before them"
    )


def working_dtype(rows: GradientRows) -> torch.dtype:
    """float64 where gradients are kept so, else float32."""
    return (
        torch.float64
        if any(dtype_of(form) == torch.float64 for form in rows.forms.values())
        else torch.float32
    )
