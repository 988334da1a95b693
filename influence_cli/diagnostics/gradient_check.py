"""Are these gradients right, on the user's own model and data? Each finding is measured against
something independent of the fast path.

gradients   the way gradients are taken, against plain autograd one example at a time batches
the same examples in another order, and alone: an example's gradient must not depend on its company
repeats     the same batch again coverage    the sum over the examples, against one backward of the
summed loss through the whole model outputs     loss_from_outputs(outputs(...)) against loss(...),
where the definition has them cache       every unit read whole, its gradients against the exact
norms beside them; some examples taken again
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import check_rows_agree
from influence_cli.cache.quantize import STORE_EPS
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import read_unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.errors import CacheError, listed
from influence_cli.extraction import revalidate
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.capture import Capture, Captured, rounding
from influence_cli.gradients.forms import Form, Projected
from influence_cli.run.checkpoints import Checkpoint

EXAMPLES, CHECKPOINTS = 8, 3  # looked at: of each split, of each run; evenly spread
DENSE_BYTES = (
    2 << 30
    # dense gradients of the examples looked at, in the few copies that are compared; at least two
    # examples
)


@dataclass(frozen=True)
class Finding:
    """One check of one subject (a parameter, or a part of the cache): the worst error found,
    relative, and the rounding that is allowed.
    """

    check: str
    split: str
    subject: str
    error: float
    allowed: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # not a number: failed


def findings(
    gradients: GradientSource,
    checkpoints: Sequence[Checkpoint],
    columns: Sequence[str],
    ids: Mapping[str, Ids],
) -> list[Finding]:
    """All checks, at most CHECKPOINTS checkpoints and EXAMPLES examples of each split; of each
    subject the worst.
    """
    worst: dict[tuple[str, str, str], Finding] = {}
    looked_at = [checkpoints[i] for i in spread(len(checkpoints), CHECKPOINTS)]
    numbers = sum(
        gradients.run.columns[name].numel * gradients.run.columns[name].dtype.itemsize
        for name in columns
    )
    most = min(EXAMPLES, max(2, DENSE_BYTES // (6 * numbers)))
    chosen = {
        split: np.array([wanted[i] for i in spread(len(wanted), most)])
        for split, wanted in ids.items()
    }
    exact = gradients.exact()
    with gradients.reporter.progress(
        "gradients taken again", len(looked_at) * sum(map(len, chosen.values()))
    ) as advance:
        for checkpoint in looked_at:
            exact.run.model.at(checkpoint)
            for split, some in chosen.items():
                for finding in check_gradients(exact, checkpoint, split, columns, some):
                    key = finding.check, finding.split, finding.subject
                    if key not in worst or not finding.error <= worst[key].error:
                        worst[key] = finding
                advance(len(some))
    order = ("gradients", "batches", "repeats", "coverage", "outputs")
    return [
        *sorted(worst.values(), key=lambda finding: order.index(finding.check)),
        *check_cache(gradients, looked_at),
    ]


def spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


# ---------------------------------------------------------------- gradients
def check_gradients(
    gradients: GradientSource,
    checkpoint: Checkpoint,
    split: str,
    columns: Sequence[str],
    ids: np.ndarray,
) -> Iterator[Finding]:
    capture, size = gradients.extractor.capture_for(split, columns), len(ids)
    assert isinstance(capture, Capture)
    batch, single = gradients.extractor.batch(split, ids)
    alone = [capture.single(single(i)) for i in range(size)]
    expected = {
        name: torch.stack([grads[name] for _, grads in alone]).flatten(1) for name in columns
    }
    losses = torch.cat([loss for loss, _ in alone]).double().cpu()
    fast = capture(batch, single, size)
    sizes = Scales.of(expected)
    reached = {name: bool(value.any()) for name, value in expected.items()}

    def compared(
        check: str,
        computed: tuple[Tensor, Mapping[str, Tensor]],
        wanted: tuple[Tensor, Mapping[str, Tensor]],
        note: Callable[[str], str],
    ) -> Iterator[Finding]:
        off = (computed[0] - wanted[0]).abs() / losses.abs().max().clamp(min=1e-30)
        yield Finding(
            check,
            split,
            "the loss",
            float(off.max()),
            rounding(expected[columns[0]].dtype),
            place(off),
        )
        for name in columns:
            off = (computed[1][name] - wanted[1][name]).double().norm(dim=1).cpu() / sizes.scale(
                name
            )
            text = "; ".join(part for part in (note(name), place(off)) if part)
            yield Finding(
                check, split, name, float(off.max()), rounding(expected[name].dtype), text
            )

    def place(off: Tensor) -> str:
        """Where the worst is; nothing where it is no more than rounding."""
        worst = int(off.argmax())  # a nan counts as the largest
        return (
            f"example {ids[worst]}, {checkpoint.name}"
            if not off[worst] <= rounding(torch.float32)
            else ""
        )

    def way(name: str) -> str:
        description = (
            "by its rule"
            if name in capture.hooked
            else f"by torch.func: {capture.why_not_hooked.get(name, 'no rule')}"
        )
        description = description if capture.at_once else "one example at a time"
        return description if reached[name] else f"{description}; zero at all of these examples"

    fast_values = fast.losses, dense(fast.forms)
    yield from compared("gradients", fast_values, (losses, expected), way)
    for order in (np.arange(size)[::-1].copy(), np.arange(1)):
        other, other_single = gradients.extractor.batch(split, ids[order])
        again = capture(other, other_single, len(order))
        yield from compared(
            "batches", placed(fast_values, order, again), fast_values, lambda name: ""
        )
    again = capture(batch, single, size)
    same = all(
        torch.equal(value, fast_values[1][name]) for name, value in dense(again.forms).items()
    )
    yield from compared(
        "repeats",
        (again.losses, dense(again.forms)),
        fast_values,
        lambda name: "the same bits" if same else "other bits",
    )
    yield from check_coverage(gradients, capture, split, batch, size, fast_values[1], sizes)
    yield from check_outputs(gradients, split, batch, losses)


def placed(
    first: tuple[Tensor, Mapping[str, Tensor]], order: np.ndarray, again: Captured
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients as they were, those of `order` as they came out again."""
    losses, grads = first[0].clone(), {name: value.clone() for name, value in first[1].items()}
    losses[order] = again.losses
    for name, value in dense(again.forms).items():
        grads[name][order] = value
    return losses, grads


def dense(forms: Mapping[str, Form]) -> dict[str, Tensor]:
    return {name: form.dense().values for name, form in forms.items()}


@dataclass(frozen=True)
class Scales:
    """What errors are relative to: the largest gradient of a parameter; where those are but
    rounding, a little of the whole gradient's.
    """

    largest: dict[str, float]
    least: float

    @classmethod
    def of(cls, expected: Mapping[str, Tensor]) -> "Scales":
        norms = {name: value.double().norm(dim=1) for name, value in expected.items()}
        norm = float(
            sum((value.square() for value in norms.values()), torch.zeros(())).max().sqrt()
        )
        dtype = next(iter(expected.values())).dtype
        return cls(
            {name: float(value.max()) for name, value in norms.items()},
            torch.finfo(dtype).eps ** 0.75 / rounding(dtype) * norm,
        )

    def scale(self, name: str) -> float:
        return max(self.largest[name], self.least, 1e-30)


def check_coverage(
    gradients: GradientSource,
    capture: Capture,
    split: str,
    batch: Any,
    size: int,
    computed: Mapping[str, Tensor],
    sizes: Scales,
) -> Iterator[Finding]:
    """Every parameter that training moves is accounted for: asked of the model, not of what was
    selected from it.
    """
    model = gradients.run.model.module
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    losses = capture.quantity(model, batch)
    grads = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
    for (name, parameter), grad in zip(trained.items(), grads, strict=True):
        if name not in gradients.run.columns:
            yield Finding(
                "coverage",
                split,
                name,
                math.inf,
                rounding(parameter.dtype),
                "trained, but no gradients are taken of it",
            )
        elif name in computed:
            total_norm = (
                torch.zeros_like(parameter)
                if grad is None
                else grad.to_dense()
                if grad.is_sparse
                else grad
            )
            off = (computed[name].double().sum(0) - total_norm.double().flatten()).norm() / (
                size * sizes.scale(name)
            )
            yield Finding("coverage", split, name, float(off), rounding(parameter.dtype))


def check_outputs(
    gradients: GradientSource, split: str, batch: Any, losses: Tensor
) -> Iterator[Finding]:
    definition = gradients.run.definition
    if (
        definition.has("outputs")
        and definition.has("loss_from_outputs")
        and not (split == "query" and definition.has("measure"))
    ):
        with torch.no_grad():
            from_outputs = definition.call(
                "loss_from_outputs",
                definition.call("outputs", gradients.run.model.module, batch),
                batch,
            )
        if not isinstance(from_outputs, Tensor) or from_outputs.shape != losses.shape:
            shape = tuple(getattr(from_outputs, "shape", ()))
            yield Finding(
                "outputs",
                split,
                "loss_from_outputs()",
                math.inf,
                0.0,
                f"shape {shape}, expected {tuple(losses.shape)}",
            )
            return
        off = (from_outputs.double().cpu() - losses).abs().max() / losses.abs().max().clamp(
            min=1e-30
        )
        yield Finding(
            "outputs", split, "loss_from_outputs()", float(off), rounding(from_outputs.dtype)
        )


# ---------------------------------------------------------------- cache
def check_cache(gradients: GradientSource, checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    """Every unit of the cache is read; of the checkpoints looked at some examples are taken
    again.
    """
    if gradients.cache is None:
        return
    store = gradients.cache.store
    places = sorted([*store.folder.glob("*/step-*/train"), *store.folder.glob("*/step-*/query/*")])
    with gradients.reporter.progress("cache files", len(places)) as advance:
        for place in places:
            yield check_units(store, place)
            advance(1)
    for checkpoint in checkpoints:
        place = gradients.cache.folder("train", checkpoint)
        units = [
            unit
            for unit in gradients.cache.index("train", checkpoint).units
            if all(map(gradients.run.has, unit.columns))
        ]
        if units:
            yield taken_again(gradients, checkpoint, place, UnitIndex(units))


def check_units(store: Store, place: Path) -> Finding:
    """The units of one folder: whole, and their gradients (but for projected ones) of the norms
    that were exact when they were taken.
    """
    subject, split = (
        str(place.relative_to(store.folder)),
        "query" if "query" in place.parts else "train",
    )
    eps = STORE_EPS[getattr(torch, subject.split("-stored-")[1].split("-")[0])]
    allowed = max(4 * eps, rounding(torch.float32) if eps > 1e-12 else rounding(torch.float64))
    worst, count, examples = 0.0, 0, 0
    try:
        for unit in store.index_units(place).units:
            rows = read_unit(unit, unit.columns, unit.level, unit.example_ids)
            for name in unit.columns:
                norms = rows.sqnorms[name].sqrt()
                kept = (
                    rows.forms[name].sqnorm().sqrt()
                    if unit.level == "values" and is_exact(rows.forms[name])
                    else norms
                )
                off = float(((kept - norms).abs() / norms.max().clamp(min=1e-30)).max())
                if not off <= allowed:
                    return Finding(
                        "cache",
                        split,
                        subject,
                        off,
                        allowed,
                        f"{unit.path.name} holds other gradients of {name} than were taken",
                    )
                worst = max(worst, off)
            count, examples = count + 1, examples + len(rows.ids)
    except CacheError as error:
        return Finding("cache", split, subject, math.nan, allowed, error.headline)
    return Finding(
        "cache", split, subject, worst, allowed, f"{count:,} files, {examples:,} examples"
    )


def is_exact(form: Form) -> bool:
    return not isinstance(form, Projected) or form.values.shape[1] == math.prod(form.shape)


def taken_again(
    gradients: GradientSource, checkpoint: Checkpoint, place: Path, index: UnitIndex
) -> Finding:
    """Some of what is cached, against the same taken now; all items behind it, against the
    dataset.
    """
    assert gradients.cache is not None
    store = gradients.cache.store
    subject, count = f"{checkpoint.name}, taken again", 0
    try:
        revalidate.check_items(
            gradients.run,
            "train",
            {place: index},
            store,
            gradients.reporter,
            all_items=True,
        )
        for unit, ids in revalidate.sample_rows(index.units, EXAMPLES, len(gradients.run.train)):
            stored = UnitIndex([unit]).read_rows(unit.columns, unit.level, ids)
            now = gradients.recompute("train", checkpoint, unit.columns, ids)
            check_rows_agree(
                stored,
                now,
                gradients.settings.rounding,
                checkpoint.name,
                "train",
                store.folder,
            )
            count += len(ids)
    except CacheError as error:
        return Finding(
            "cache",
            "train",
            subject,
            math.nan,
            gradients.settings.rounding,
            "; ".join((error.headline, *error.details[:1])),
        )
    return Finding(
        "cache",
        "train",
        subject,
        0.0,
        gradients.settings.rounding,
        f"{listed([count])} gradients agree",
    )
