"""Query form: the queries' gradients at the end of training, carried back over every step. Nothing
of size p x p.

Q query, p numbers of all parameters.
"""

import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import checkpoint_key
from influence_cli.cache.unit_file import open_tensor_file
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.pairwise import QUERY_BYTES, mean_query_row, query_rows
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.reverse.occurrences import New, Sums, Totals, Trace
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.options import ReverseOptions
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import ReverseStep, back, sizes, working_dtype
from influence_cli.progress import Advance
from influence_cli.storage.atomic import report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors

KEEP_EVERY = 30.0  # seconds between what is kept of a job for when it is killed
Take = Callable[
    [int, torch.dtype, int, bool], Iterator[ReverseStep]
]  # (Q, precision, stop, by layer) -> the steps below `stop`, last first
Work = Callable[[GradientRows, "Totals | Trace", Advance], None]


def passes(
    gradients: GradientSource,
    question: ScoreRequest,
    plan: ReversePlan,
    new: New[Sums],
    work: Callable[[Path], Work],
) -> Iterator[tuple[Ids, Sums]]:
    """Per pass over training its query ids, and what `new` collected of its scores. `work` (of a
    folder to spill to) goes over the steps.

    Raises GradientError (what is carried back runs away).
    """
    for note in plan.notes:
        gradients.reporter.note(note)
    gradients.ensure("query", [plan.end], list(plan.columns), question.queries)
    most = queries_of_a_pass(gradients, plan, question)
    cuts = [
        question.queries[first : first + most] for first in range(0, len(question.queries), most)
    ]
    with tempfile.TemporaryDirectory(prefix="influence-back-") as name:
        go = work(Path(name))
        for number, ids in enumerate(cuts, start=1):
            rows = (mean_query_row if question.sum_queries else query_rows)(
                gradients, dataclasses.replace(question, columns=plan.columns), plan.end, ids
            )
            sums = new(len(rows.ids), Path(name))
            of = f", queries {number} of {len(cuts)}" if len(cuts) > 1 else ""
            with gradients.reporter.progress(
                f"back over training{of}", plan.occurrences()
            ) as advance:
                go(rows, sums, advance)
            yield ids, sums


def queries_of_a_pass(gradients: GradientSource, plan: ReversePlan, question: ScoreRequest) -> int:
    return (
        len(question.queries)
        if question.sum_queries
        else max(1, QUERY_BYTES // (numbers(gradients, plan) * 8))
    )


def carry(
    gradients: GradientSource,
    plan: ReversePlan,
    options: ReverseOptions,
    rows: GradientRows,
    totals: Totals | Trace,
    take: Take,
    kept: "PassProgress",
    advance: Advance,
) -> None:
    """Go back over every step with the queries' gradients, or over those that `kept` has not."""
    theta = dense(rows, plan, gradients.device)
    moment, second = (
        {n: torch.zeros_like(theta[n]) for n in names}
        for names in (plan.with_momentum, plan.columns if plan.adam else ())
    )
    adjoint = Adjoint(theta, moment, second)
    layers: dict[str, list[str] | None] = {}
    for name, column in plan.columns.items() if totals.by == "layer" else ():
        layers.setdefault(column.layer, []).append(name)  # type: ignore[union-attr]
    width, wide = len(rows.ids), next(iter(theta.values())).dtype

    def add(step: int, part: str, examples: np.ndarray, effects: dict[str, Tensor]) -> None:
        totals.add(step, part, examples, effects)
        advance(len(examples), f"step {step}")

    kept.open(rows, totals.by)
    start, stop = sizes(adjoint), plan.steps.stop
    if (resumed := kept.restore(adjoint, add)) is not None:
        stop, start = resumed
        gradients.reporter.note(
            f"going on below step {stop:,}: what comes after was kept by a run that ended"
        )
    kept.start = start
    for step in back(take(width, wide, stop, totals.by == "layer"), plan, adjoint, start):
        effects = {
            layer: step.effects(options.renormalize, names)
            for layer, names in (layers or {"": None}).items()
        }
        add(step.number, str(step.checkpoint.step), step.examples, effects)
        kept.add(adjoint, step.number, step.checkpoint.step, step.examples, effects)
    kept.done()


def dense(rows: GradientRows, plan: ReversePlan, device: torch.device) -> dict[str, Tensor]:
    """Per parameter (Q, D): the queries' gradients, in memory of their own."""
    wide = working_dtype(rows)
    return {name: rows.forms[name].to(device, wide).dense().values.clone() for name in plan.columns}


def numbers(gradients: GradientSource, plan: ReversePlan) -> int:
    """What is carried back of one quantity: p, and p again with momentum, and once more with
    Adam.
    """
    return sum(
        gradients.settings.width(column) * (1 + (name in plan.with_momentum) + plan.adam)
        for name, column in plan.columns.items()
    )


# ---------------------------------------------------------------- for when it is killed
class PassProgress:
    """What a job has so far, on disk now and then: scores of the steps it went over, and what it
    carries. A run of the same goes on there.

    FOLDER/back/DIGEST/scores-000090-000120.safetensors, carried.safetensors. Gone when the job is
    done.
    """

    def __init__(
        self,
        gradients: GradientSource | None,
        plan: ReversePlan,
        options: ReverseOptions,
        method: str,
    ) -> None:
        """`gradients` None, or without a cache: nothing is kept."""
        self.gradients, self.plan, self.options, self.method = gradients, plan, options, method
        self.folder: Path | None = None
        self.start: Tensor | None = None
        self._waiting: list[tuple[int, int, np.ndarray, dict[str, Tensor]]] = []
        self._last = time.monotonic()

    def open(self, rows: GradientRows, by: str | None) -> None:
        """The place of these queries' job."""
        if self.gradients is None or self.gradients.cache is None:
            return
        store, run = self.gradients.cache.store, self.gradients.run
        digest = hashlib.sha256()
        for name in self.plan.columns:
            digest.update(name.encode() + rows.forms[name].dense().values.numpy().tobytes())
        memory = store.folder / "checkpoints.json"
        parts = [
            self.method,
            repr(self.options),
            by == "layer",
            run.definition.digest,
            self.gradients.settings.key,
            hashlib.sha256(self.plan.trajectory.path.read_bytes()).hexdigest(),
            [
                (segment.first, segment.stop, checkpoint_key(segment.checkpoint, memory))
                for segment in self.plan.segments
            ],
        ]
        digest.update(json.dumps(parts).encode())
        self.folder, self._waiting, self._last = (
            store.folder / "back" / digest.hexdigest()[:16],
            [],
            time.monotonic(),
        )

    def restore(
        self, adjoint: Adjoint, add: Callable[[int, str, np.ndarray, dict[str, Tensor]], None]
    ) -> tuple[int, Tensor] | None:
        """Hands out the scores that are there, last step first, and puts back what was carried.
        Returns the step down to which that is done and the norms at the end of training; None where
        there is nothing.
        """
        if self.folder is None or not (self.folder / "carried.safetensors").is_file():
            return None
        with open_tensor_file(self.folder / "carried.safetensors") as file:
            content = file.read(list(file.entries))
        stop = int(content["step"])
        for path in sorted(self.folder.glob("scores-*.safetensors"), reverse=True):
            if int(path.stem.split("-")[1]) < stop:
                continue  # written, and then the job was killed
            with open_tensor_file(path) as file:
                tensors = file.read(list(file.entries))
            values = {
                name.partition(":")[2]: value
                for name, value in tensors.items()
                if name.startswith("values:")
            }
            steps, starts = np.unique(-tensors["step"].numpy(), return_index=True)
            for step, at in zip(
                -steps, np.split(np.arange(len(tensors["step"])), starts[1:]), strict=True
            ):
                span = slice(int(at[0]), int(at[-1]) + 1)
                some = {name: value[span] for name, value in values.items()}
                add(
                    int(step),
                    str(int(tensors["checkpoint"][span.start])),
                    tensors["example"].numpy()[span],
                    some,
                )
        for kind, state in (
            ("theta", adjoint.theta),
            ("moment", adjoint.moment),
            ("second", adjoint.second),
        ):
            for name, value in state.items():
                value.copy_(content[f"{kind}:{name}"])
        return stop, content["start"]

    def add(
        self,
        adjoint: Adjoint,
        step: int,
        checkpoint: int,
        examples: np.ndarray,
        effects: dict[str, Tensor],
    ) -> None:
        if self.folder is None:
            return
        self._waiting.append(
            (step, checkpoint, examples, {name: value.cpu() for name, value in effects.items()})
        )
        if time.monotonic() - self._last >= KEEP_EVERY:
            self._keep(adjoint)
            self._last = time.monotonic()

    def _keep(self, adjoint: Adjoint) -> None:
        assert self.folder is not None
        steps = [step for step, *_ in self._waiting]

        def spread(values: list[int]) -> Tensor:
            return torch.cat(
                [
                    torch.full((len(w[2]),), value)
                    for value, w in zip(values, self._waiting, strict=True)
                ]
            )

        content = {
            f"values:{name}": torch.cat([w[3][name] for w in self._waiting])
            for name in self._waiting[0][3]
        }
        content |= {"step": spread(steps), "checkpoint": spread([w[1] for w in self._waiting])}
        content["example"] = torch.from_numpy(np.concatenate([w[2] for w in self._waiting]))
        states = (("theta", adjoint.theta), ("moment", adjoint.moment), ("second", adjoint.second))
        carried = {
            f"{kind}:{name}": value.cpu() for kind, state in states for name, value in state.items()
        }
        assert self.start is not None
        carried |= {"step": torch.tensor(steps[-1]), "start": self.start}
        with report_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, what in (
                (f"scores-{steps[-1]:06d}-{steps[0] + 1:06d}", content),
                ("carried", carried),
            ):
                write_tensors(self.folder / f"{name}.safetensors", what, {})
        self._waiting = []

    def done(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
