"""From the end of training back to its beginning: the recorded steps in reverse order, each with its batch's cached gradients.

Between two checkpoints, a segment, the gradients are those of its first one, with each step's own batch, step size and clipping. Where
every step is saved nothing is approximated by that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.build import Gradients
from influence_cli.cache.store import Rows, concat_rows
from influence_cli.errors import GradientError, TrajectoryError, UsageProblem, listed
from influence_cli.gradients.forms import Form
from influence_cli.gradients.joining import distance
from influence_cli.methods.adjoint import Adjoint, Update, densely, effects, gram, total
from influence_cli.methods.ranked import dtype_of
from influence_cli.run import Checkpoint, Column, Run
from influence_cli.run.trajectory import Trajectory
from influence_cli.talk import Advance

ROWS_BYTES = 1 << 30  # gradients of training examples held at once
GROWTH = 1e4  # of a derivative over training: past it the recursion has run away
DRIFT_SEGMENTS, DRIFT_EXAMPLES = 16, 8
NO_TRAJECTORY = (
    "expected: RUN/trajectory.jsonl, which says what was trained on, when, and at which step size. Three lines record it:",
    "    with influence_cli.TrajectoryRecorder(RUN, model, optimizer, checkpoint_every=100) as recorder:",
    "        ...                                   # your training loop",
    "        recorder.step(indices)                # before each optimizer.step()",
    "--trajectory FILE names one elsewhere; --method tracin needs none",
)


@dataclass(frozen=True)
class Segment:
    """The steps first..stop, whose gradients are taken at one checkpoint."""

    checkpoint: Checkpoint
    first: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Which steps are gone back over, in segments by rising step; `end`: the checkpoint whose quantity is explained."""

    trajectory: Trajectory
    segments: tuple[Segment, ...]
    end: Checkpoint
    columns: dict[str, Column]  # those that were trained
    notes: tuple[str, ...]

    @property
    def steps(self) -> range:
        return range(self.segments[0].first, self.segments[-1].stop)

    def updates(self, step: int) -> dict[str, Update]:
        """How the step changed each parameter."""
        rates, found = self.trajectory.rates(step), {}
        for name, column in self.columns.items():
            number = self.trajectory.group_of(column.names)
            assert number is not None
            options = self.trajectory.groups[number].options
            found[name] = Update(rates[number], momentum(options), float(options.get("weight_decay", 0)), bool(options.get("nesterov")))
        return found

    @property
    def with_momentum(self) -> list[str]:
        return [name for name, update in self.updates(self.segments[0].first).items() if update.momentum]

    def occurrences(self, steps: range | None = None) -> int:
        return sum(len(self.trajectory.lines[step].examples) for step in (self.steps if steps is None else steps))

    def examples(self, segment: Segment) -> np.ndarray:
        """The ids of a segment's examples, rising."""
        return np.unique(np.concatenate([self.trajectory.lines[step].examples for step in range(segment.first, segment.stop)]))

    @property
    def wanted(self) -> list[tuple[Checkpoint, np.ndarray]]:
        """Whose gradients are needed, at each segment's checkpoint."""
        return [(segment.checkpoint, ids) for segment in self.segments if len(ids := self.examples(segment))]

    def between(self, first: int, stop: int) -> "tuple[Segment, ...]":
        """The segments, or parts of them, of these steps."""
        cut = (Segment(s.checkpoint, max(s.first, first), min(s.stop, stop)) for s in self.segments)
        return tuple(segment for segment in cut if segment.first < segment.stop)


def momentum(options: Mapping[str, object]) -> float:
    return float(options.get("momentum", 0))  # type: ignore[arg-type]


def plan(run: Run, checkpoints: tuple[Checkpoint, ...], columns: dict[str, Column], at: int | None = None) -> Plan:
    """Raises TrajectoryError: no trajectory, one that ends too early, an optimizer without an adjoint here; UsageProblem for `at`."""
    trajectory = run.trajectory
    if trajectory is None:
        raise TrajectoryError("dve needs the order of training, and this run has no trajectory", *NO_TRAJECTORY)
    check_optimizer(trajectory)
    if at is not None and at not in [checkpoint.step for checkpoint in checkpoints]:
        steps = listed([checkpoint.step for checkpoint in checkpoints], 20)
        raise UsageProblem(f"--at {at}: no checkpoint there", f"there are checkpoints of the steps {steps}")
    checkpoints = tuple(checkpoint for checkpoint in checkpoints if at is None or checkpoint.step <= at)
    end, notes = checkpoints[-1], list(trajectory.notes)
    if end.step > trajectory.steps:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {end.name}",
            f"it has the steps 0 to {trajectory.steps - 1:,}; a checkpoint of step {trajectory.steps:,} is the last it can explain",
            "--at STEP or --steps chooses another end; or the trajectory is of another run",
        )
    if not end.step:
        raise UsageProblem(f"{end.name} is from before the first step: nothing was trained on", "--at STEP or --steps chooses a later end")
    if end.step < trajectory.steps and at is None:
        notes.append(f"steps {end.step:,} to {trajectory.steps - 1:,} come after the last checkpoint and are left out")
    starts = [*checkpoints[:-1]] or [end]
    if starts[0].step:
        notes.append(f"steps 0 to {min(starts[0].step, end.step) - 1:,} come before the first checkpoint: {starts[0].name} stands for them")
    edges = [0, *(checkpoint.step for checkpoint in starts[1:]), end.step]
    segments = tuple(Segment(c, first, stop) for c, first, stop in zip(starts, edges[:-1], edges[1:], strict=True))
    trained = {name: column for name, column in columns.items() if trajectory.group_of(column.names) is not None}
    if len(trained) < len(columns):
        notes.append(f"never trained, by the trajectory's groups: {listed([name for name in columns if name not in trained])}")
    if not trained:
        raise UsageProblem("none of the selected parameters was trained, by the trajectory's groups", f"selected: {listed(columns)}")
    if len(columns) < len(run.columns) and any(line.clip != 1 for line in trajectory.lines[: end.step]):
        notes.append("steps were clipped by the norm over all parameters; here it is the norm over the selected ones")
    return Plan(trajectory, segments, end, trained, tuple(notes))


def check_optimizer(trajectory: Trajectory) -> None:
    if trajectory.optimizer is None:
        raise TrajectoryError(
            f"{trajectory.path.name}: the header names no optimizer",
            'expected: "optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, torch\'s names',
        )
    if trajectory.optimizer != "sgd":
        adam = trajectory.optimizer in ("adam", "adamw")
        why = "their exact adjoint needs both moments at every step, which come with replay, not built yet" if adam else "its step"
        raise TrajectoryError(
            f"{trajectory.path.name}: dve can't go back over steps of {trajectory.optimizer}",
            f"{'Adam and AdamW: ' + why if adam else why + ' has no adjoint here'}; a frozen preconditioner is far off, so none is used",
            "expected: sgd, with momentum, nesterov and weight_decay; --method tracin reads gradients alone",
        )
    for group in trajectory.groups:
        for name in ("dampening", "maximize"):
            if group.options.get(name):
                raise TrajectoryError(f"{trajectory.path.name}: sgd with {name} = {group.options[name]!r} has no adjoint here")
        for name in ("momentum", "weight_decay"):
            value = group.options.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise TrajectoryError(f"{trajectory.path.name}: {name} is {value!r}", "expected: a number from 0")


def prepare(gradients: Gradients, plan: Plan) -> None:
    """Take and keep the gradients that are missing, each segment's of its own examples; say how far its frozen ones can be trusted."""
    gradients.ensure_each("train", plan.wanted, list(plan.columns))
    if (found := drift(gradients, plan)) is not None:
        gradients.talk.note(found)


# ---------------------------------------------------------------- the way back
@dataclass
class Step:
    """What came of one step back: per parameter (B, K) the product of each entry's gradient with u."""

    number: int
    checkpoint: Checkpoint
    examples: np.ndarray  # (B,) rising
    weights: Tensor
    products: dict[str, Tensor]

    def effects(self, renormalize: bool, names: Sequence[str] | None = None) -> Tensor:
        """(B, K) what leaving out each entry would have done, by the gradients of these parameters or all."""
        entry_of = torch.from_numpy(np.unique(self.examples, return_inverse=True)[1]).to(self.weights.device) if renormalize else None
        return effects(total({name: self.products[name] for name in names or self.products}), self.weights, entry_of)


class Stability:
    """Watches the curvature of each step and the size of what is carried back."""

    def __init__(self) -> None:
        self.worst: list[tuple[float, int]] = []  # (share of the limit, step) of the steps at or past it

    def curvature(self, step: int, norms: Tensor, gradients: Mapping[str, Form], weights: Tensor, updates: dict[str, Update]) -> None:
        """The largest eigenvalue of the step's whole rate x H against what such steps bear. `norms` (B,): its trace often settles it."""
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
            f"{len(self.worst)} steps are unstable: at step {step} the curvature is {share:.3g} times what its size bears, so that "
            "what came before it is blown up; checkpoints closer together help, as gradients of one stand for all steps to the next"
        )


def top_eigenvalue(matrix: Tensor) -> float:
    """Of a symmetric matrix without negative eigenvalues, by power iteration."""
    vector = matrix.sum(1) + matrix.diagonal()
    found = 0.0
    for _ in range(1000):
        size = float(vector.norm())
        if not 0 < size < float("inf"):
            return size
        last, vector = found, matrix @ (vector / size)
        found = float(vector.norm())
        if abs(found - last) < 1e-6 * found:
            break
    return found


def back(
    gradients: Gradients, plan: Plan, segments: tuple[Segment, ...], adjoint: Adjoint, curved: bool, stability: Stability, advance: Advance
) -> Iterator[Step]:
    """The steps of these segments, last first. Memory: ROWS_BYTES of gradients.

    `curved`: with H, the empirical Fisher of the batch. Raises GradientError where what is carried back runs away.
    """
    columns, start = list(plan.columns), sizes(adjoint)
    wide = next(iter(adjoint.theta.values())).dtype
    each = sum(column.numel for column in plan.columns.values()) * wide.itemsize
    stored = gradients.sizes("train", columns).bytes_of(columns)
    for segment in reversed(segments):
        for steps in reversed(list(chunks(plan.trajectory, segment, max(1, ROWS_BYTES // min(each, 2 * stored))))):
            ids = np.unique(np.concatenate([plan.trajectory.lines[step].examples for step in steps]))
            if not len(ids):
                continue
            rows = concat_rows(list(gradients.read("train", segment.checkpoint, columns, ids)))
            forms = {name: form.to(gradients.device, wide) for name, form in rows.forms.items()}
            for number in reversed(steps):
                line, updates = plan.trajectory.lines[number], plan.updates(number)
                order = np.argsort(line.examples, kind="stable")
                examples = line.examples[order]
                if not len(examples):
                    continue
                place = np.searchsorted(ids, examples)
                at = torch.from_numpy(place).to(gradients.device)
                batch = (
                    forms if len(place) == len(ids) and (place == np.arange(len(ids))).all() else {n: f.take(at) for n, f in forms.items()}
                )
                batch = densely(batch, len(next(iter(adjoint.theta.values()))))
                weights = torch.from_numpy(plan.trajectory.weights(number)[order]).to(gradients.device, wide)
                if curved:
                    stability.curvature(number, step_sizes(rows, place, weights, updates, line.clip), batch, weights * line.clip, updates)
                yield Step(
                    number,
                    segment.checkpoint,
                    examples,
                    weights,
                    adjoint.step(batch, weights, updates, line.clip, batch if curved else None),
                )
                check_growth(start, sizes(adjoint), number)
                advance(len(examples), f"step {number}")


def chunks(trajectory: Trajectory, segment: Segment, most: int) -> Iterator[range]:
    """A segment's steps, cut so that each cut has at most `most` different examples, or is one step."""
    first, seen = segment.first, set(trajectory.lines[segment.first].examples.tolist())
    for step in range(segment.first + 1, segment.stop):
        more = seen.union(trajectory.lines[step].examples.tolist())
        if len(more) > most:
            yield range(first, step)
            first, more = step, set(trajectory.lines[step].examples.tolist())
        seen = more
    yield range(first, segment.stop)


def step_sizes(rows: Rows, place: np.ndarray, weights: Tensor, updates: dict[str, Update], clip: float) -> Tensor:
    """(B,) rate x w x |g|^2 of each entry: their sum is the trace of the step's rate x H."""
    norms = sum((update.rate * rows.sqnorms[name][place] for name, update in updates.items()), torch.zeros(()))
    return norms * weights.cpu() * clip


def sizes(adjoint: Adjoint) -> Tensor:
    """(K,) the norm of what is carried of each quantity."""
    squares = [value.norm(dim=1).square() for state in (adjoint.theta, adjoint.moment) for value in state.values()]
    return torch.stack(squares).sum(0).sqrt().cpu()


def check_growth(start: Tensor, now: Tensor, step: int) -> None:
    bad = ~(now <= GROWTH * start)
    if bad.any():
        growth = float((now[bad] / start[bad])[0])
        raise GradientError(
            f"going back over training ran away at step {step}: what is carried grew {growth:.3g} times",
            "the gradients of one checkpoint stand for all steps to the next, and the step size is too large for that there",
            "save checkpoints closer together, or begin later (--steps); --curvature none leaves the curvature out",
        )


# ---------------------------------------------------------------- how far it can be trusted
def drift(gradients: Gradients, plan: Plan) -> str | None:
    """How much gradients change between neighbouring checkpoints, from some examples of some segments; None where each step is saved."""
    following = [*(segment.checkpoint for segment in plan.segments[1:]), plan.end]
    frozen = [
        (segment, after)
        for segment, after in zip(plan.segments, following, strict=True)
        if segment.stop - segment.first > 1 and after != segment.checkpoint
    ]
    cosines: list[tuple[float, Segment]] = []
    columns = list(plan.columns)
    for segment, after in (frozen[k] for k in spread(np.arange(len(frozen)), DRIFT_SEGMENTS)):
        ids = spread(plan.examples(segment), DRIFT_EXAMPLES)
        gradients.ensure("train", [after], columns, ids)
        before, then = (concat_rows(list(gradients.read("train", c, columns, ids))) for c in (segment.checkpoint, after))
        ours, theirs = (torch.stack([rows.sqnorms[name] for name in columns]).sum(0) for rows in (before, then))
        apart = torch.stack([distance(before.forms[name], then.forms[name]).square() for name in columns]).sum(0)
        cosine = (ours + theirs - apart) / (2 * (ours * theirs).sqrt())
        cosines += [(float(value), segment) for value in cosine if value == value]  # a zero gradient has no direction
    if not cosines:
        return None
    least, where = min(cosines, key=lambda pair: pair[0])
    middle = float(np.median([value for value, _ in cosines]))
    return (
        f"drift: the same examples' gradients at neighbouring checkpoints have a median cosine of {middle:.2f}, the least {least:.2f} "
        f"(after step {where.checkpoint.step:,}); steps between are given the gradients of the checkpoint before them"
    )


def spread(values: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the values, evenly spread."""
    return values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).round().astype(int))]


def working_dtype(rows: Rows) -> torch.dtype:
    """float64 where gradients are kept so, else float32."""
    return torch.float64 if any(dtype_of(form) == torch.float64 for form in rows.forms.values()) else torch.float32
