"""Data value embeddings on disk: the effect of each occurrence on every coordinate of the end.

DIR/embeddings.json              what they are of; those of another run are refused
DIR/sample.safetensors           losses and norms of a few training examples, to detect a change of
                                 the definition
DIR/part-000000-000120/          the steps of a part, computed from the identity at its end
  rows-000090-000120.safetensors per occurrence (M, n): its effect on the state at the part's end,
                                 with its step and example
  map.safetensors                (n, n): from the state at the part's end to that at its start;
                                 written last

The state is the parameters, and the momentum buffers where there are some: n numbers. Parts are
computed side by side and compose: a query passes through the maps from the end of training, and
meets the rows of each part. So any part's end can be explained (`--at`) by reading alone.
"""

import dataclasses
import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.cache.identity import check_rows_agree, checkpoint_key
from influence_cli.cache.unit_file import open_tensor_file
from influence_cli.errors import CacheError, UsageProblem, listed
from influence_cli.extraction.machine import available_memory, check_fits
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.dve import DveOptions
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import Fisher, Stability, back, prepare, sizes
from influence_cli.progress import Advance
from influence_cli.storage.atomic import read_json, report_disk_errors, write_json
from influence_cli.storage.safetensors_io import write_tensors

FORMAT, VERSION = "influence-embeddings", 1
STATE_BYTES = 2 << 30  # of a map: what may be carried back without being asked for
ROWS_BYTES = 64 << 20  # of a file of rows
SAMPLE = 8
Part = tuple[int, int]


class Embeddings:
    """Those of one run's steps in one folder."""

    def __init__(
        self,
        folder: Path,
        gradients: GradientSource,
        full_plan: ReversePlan,
        stop: int,
        options: DveOptions,
    ) -> None:
        """Of the `whole` training, read up to the step `stop`. Raises CacheError where the folder
        holds something else, UsageProblem where `stop` is inside of a part.
        """
        self.folder, self.gradients, self.plan, self.stop, self.options = (
            folder,
            gradients,
            full_plan,
            stop,
            options,
        )
        self.moments = full_plan.with_momentum
        self.names = [*full_plan.columns, *(f"momentum of {name}" for name in self.moments)]
        self.widths = [
            gradients.settings.width(full_plan.columns[name])
            for name in (*full_plan.columns, *self.moments)
        ]
        self.size = sum(self.widths)
        self.parts = cut(full_plan, self.size)
        if self.stop not in [stop for _, stop in self.parts]:
            steps = [stop for _, stop in self.parts]
            raise UsageProblem(
                f"--at {self.stop}: embeddings are kept for the steps {listed(steps, 20)}",
                "leave out --embeddings, which answers for every checkpoint, or name one of these",
            )

    # ------------------------------------------------------------ making
    def ensure(self) -> None:
        """Make the parts that are not there."""
        with report_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._identify()
        todo = [part for part in self.parts if not self.is_complete(part)]
        if not todo:
            return
        prepare(self.gradients, self.plan)
        wide = self.dtype.itemsize
        rows = sum(self.plan.occurrences(range(*part)) for part in todo) * self.size * wide
        state = 2 * self.size * self.size * wide
        room = (available_memory() or state) // state
        if not room:
            raise UsageProblem(
                f"the embedding form carries {self.size:,} x {self.size:,} numbers back, which do "
                f"not fit into memory ({state:,} bytes)",
                "--form query (without --embeddings) carries the queries' gradients only; --layers "
                "GLOB takes fewer parameters",
            )
        check_fits(self.folder, rows + len(todo) * self.size**2 * wide, state)
        threads = torch.get_num_threads()
        workers = (
            max(1, min(threads, len(todo), room))
            if self.gradients.cache and self.gradients.device.type == "cpu"
            else 1
        )
        lock, stop, stability = threading.Lock(), threading.Event(), Stability()
        of = f" ({workers} parts at once)" if workers > 1 else ""
        with self.gradients.reporter.progress(
            f"data value embeddings{of}", sum(self.plan.occurrences(range(*part)) for part in todo)
        ) as advance:

            def work(part: Part) -> None:
                def safely(examples: int, where: str = "") -> None:
                    if stop.is_set():
                        raise KeyboardInterrupt
                    with lock:
                        advance(examples, where)

                self.make(part, stability, safely)

            if workers > 1:
                torch.set_num_threads(1)
            pool = ThreadPoolExecutor(workers)
            try:
                for done in [pool.submit(work, part) for part in reversed(todo)]:
                    done.result()
            except BaseException:
                stop.set()
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)
                if stability.note():
                    self.gradients.reporter.note(str(stability.note()))

    def is_complete(self, part: Part) -> bool:
        """Whether a part has its map, and files of rows for all of its occurrences."""
        place = self.place(part)
        spans = [
            range(*map(int, path.stem.split("-")[1:]))
            for path in place.glob("rows-*-*.safetensors")
        ]
        rows = sum(self.plan.occurrences(span) for span in spans)
        return (place / "map.safetensors").is_file() and rows == self.plan.occurrences(range(*part))

    def make(self, part: Part, stability: Stability, advance: Advance) -> None:
        """Carry the identity back from the part's end to its start, and write what its occurrences
        do to it.
        """
        last = part == self.parts[-1]
        adjoint = self.identity(sum(self.widths[: len(self.plan.columns)]) if last else self.size)
        place = self.place(part)
        with report_disk_errors(self.folder):
            place.mkdir(parents=True, exist_ok=True)
            for old in place.iterdir():
                old.unlink()
        waiting: list[tuple[int, np.ndarray, Tensor]] = []
        size = 0
        width = len(next(iter(adjoint.theta.values())))
        fisher = Fisher(
            self.gradients,
            self.plan,
            width,
            self.dtype,
            self.options.curvature != "none",
            stability,
        )
        for step in back(
            fisher.cached(self.plan.between(*part)), self.plan, adjoint, sizes(adjoint)
        ):
            advance(len(step.examples), f"step {step.number}")
            effects = step.effects(self.options.renormalize).cpu()
            waiting.append((step.number, step.examples, effects))
            size += effects.nbytes
            if size >= ROWS_BYTES:
                self.write_rows(place, waiting)
                waiting, size = [], 0
        if waiting:
            self.write_rows(place, waiting)
        states = [*adjoint.theta.values(), *(adjoint.moment[name] for name in self.moments)]
        self.write(
            place / "map.safetensors", {"map": torch.cat([value.cpu() for value in states], dim=1)}
        )

    def identity(self, rows: int) -> Adjoint:
        """Every coordinate of the state at a part's end as a quantity to carry back; at the end of
        training those of the parameters.
        """
        first, states = 0, []
        for width in self.widths:
            block = torch.zeros(rows, width, dtype=self.dtype, device=self.gradients.device)
            inside = max(0, min(width, rows - first))
            block[first : first + inside].fill_diagonal_(1)
            states.append(block)
            first += width
        count = len(self.plan.columns)
        return Adjoint(
            dict(zip(self.plan.columns, states[:count], strict=True)),
            dict(zip(self.moments, states[count:], strict=True)),
        )

    def write_rows(self, place: Path, waiting: list[tuple[int, np.ndarray, Tensor]]) -> None:
        steps = np.concatenate([np.full(len(examples), number) for number, examples, _ in waiting])
        content = {
            "step": torch.from_numpy(steps),
            "example": torch.from_numpy(np.concatenate([examples for _, examples, _ in waiting])),
            "values": torch.cat([effects for _, _, effects in waiting]),
        }
        self.write(place / f"rows-{steps.min():06d}-{steps.max() + 1:06d}.safetensors", content)

    def write(self, path: Path, content: dict[str, Tensor]) -> None:
        widths = json.dumps(dict(zip(self.names, self.widths, strict=True)))
        with report_disk_errors(self.folder):
            write_tensors(path, content, {"columns": widths})

    # ------------------------------------------------------------ reading
    def scores(
        self, theta: dict[str, Tensor], advance: Advance
    ) -> Iterator[tuple[int, int, np.ndarray, Tensor]]:
        """(step, checkpoint's step, examples, (B, Q) scores) from the queries' gradients at the
        end, last step first.
        """
        state = torch.cat([value.cpu().to(self.dtype) for value in theta.values()], dim=1)
        state = torch.cat([state, state.new_zeros(len(state), self.size - state.shape[1])], dim=1)
        checkpoint_of = {
            step: s.checkpoint.step for s in self.plan.segments for step in range(s.first, s.stop)
        }
        for part in reversed([part for part in self.parts if part[1] <= self.stop]):
            for path in sorted(self.place(part).glob("rows-*.safetensors"), reverse=True):
                with open_tensor_file(path) as file:
                    content = file.read(["step", "example", "values"])
                values = content["values"]
                effects = values @ state[:, : values.shape[1]].T
                steps, starts = np.unique(-content["step"].numpy(), return_index=True)
                for step, at in zip(
                    -steps, np.split(np.arange(len(values)), starts[1:]), strict=True
                ):
                    yield (
                        int(step),
                        checkpoint_of[int(step)],
                        content["example"].numpy()[at],
                        effects[at[0] : at[-1] + 1],
                    )
                    advance(len(at), f"step {step}")
            with open_tensor_file(self.place(part) / "map.safetensors") as file:
                turn = file.read(["map"])["map"]
            state = state[:, : len(turn)] @ turn

    def place(self, part: Part) -> Path:
        return self.folder / f"part-{part[0]:06d}-{part[1]:06d}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64 if self.gradients.settings.store == torch.float64 else torch.float32

    # ------------------------------------------------------------ identity
    def _identify(self) -> None:
        """Raise CacheError where the folder is of something else; begin it where it is empty."""
        cache, run = self.gradients.cache_folder, self.gradients.run
        memory = cache / "checkpoints.json" if cache else None
        digest = hashlib.sha256()
        for step in self.plan.steps:
            line = self.plan.trajectory.lines[step]
            digest.update(
                repr(
                    (
                        step,
                        line.lr,
                        line.clip,
                        line.examples.tolist(),
                        self.plan.trajectory.weights(step).tolist(),
                    )
                ).encode()
            )
        groups = [
            (group.names, sorted(group.options.items())) for group in self.plan.trajectory.groups
        ]
        now = {
            "format": FORMAT,
            "version": VERSION,
            "precision": self.gradients.settings.key,
            "curvature": self.options.curvature,
            "renormalize": self.options.renormalize,
            "parameters": dict(zip(self.names, self.widths, strict=True)),
            "optimizer": repr((self.plan.trajectory.optimizer, groups)),
            "steps": [self.plan.steps.start, self.plan.steps.stop],
            "trajectory": digest.hexdigest(),
            "checkpoints": [
                checkpoint_key(c, memory)
                for c in (*(s.checkpoint for s in self.plan.segments), self.plan.end)
            ],
        }
        head = self.folder / "embeddings.json"
        if head.is_file():
            stored = read_json(head)
            definition = stored.pop("definition", "")
            differs = [key for key in now if stored.get(key) != now[key]]
            if differs:
                raise CacheError(
                    f"{self.folder} holds embeddings of something else: {listed(differs)} differ",
                    *(
                        f"{key}: {short(stored.get(key))} there, {short(now[key])} now"
                        for key in differs[:3]
                    ),
                    "--embeddings DIR names another folder; deleting this one starts afresh",
                )
            if definition != run.definition.digest:
                self._compare()
            return
        if any(not path.name.startswith(".tmp-") for path in self.folder.iterdir()):
            raise CacheError(
                f"{self.folder} holds other files",
                "--embeddings DIR names an empty or a new folder",
            )
        sample = self._sample()
        content = {
            "losses": sample.losses,
            "digests": sample.digests,
            "ids": torch.from_numpy(sample.ids),
        }
        self.write(
            self.folder / "sample.safetensors",
            content | {f"{name}:sqnorms": value for name, value in sample.sqnorms.items()},
        )
        with report_disk_errors(self.folder):
            write_json(head, now | {"definition": run.definition.digest})

    def _sample(self) -> GradientRows:
        """A few training examples at the first checkpoint, taken now."""
        segment = self.plan.segments[0]
        examples = self.plan.examples(segment)
        ids = examples[spread_evenly(len(examples), SAMPLE)]
        rows = self.gradients.extractor.rows_at(
            segment.checkpoint, "train", list(self.plan.columns), ids, "norms"
        )
        return dataclasses.replace(rows, digests=self.gradients.run.train.digests(ids))

    def _compare(self) -> None:
        """The definition's text is another one now: the sample, taken again, must agree."""
        with open_tensor_file(self.folder / "sample.safetensors") as file:
            content = file.read(list(file.entries))
        norms = {name: content[f"{name}:sqnorms"] for name in self.plan.columns}
        stored = GradientRows(
            content["ids"].numpy(), content["losses"], content["digests"], norms, {}
        )
        again = self._sample()
        check_rows_agree(
            stored,
            again,
            self.gradients.settings.rounding,
            self.plan.segments[0].checkpoint.name,
            "train",
            self.folder,
        )
        self.gradients.reporter.note(
            f"the definition changed since {self.folder} was made: {SAMPLE} training gradients "
            "agree, so it is used"
        )


def cut(plan: ReversePlan, size: int) -> list[Part]:
    """Steps in parts that can be made side by side: of at least 2 n occurrences where they end with
    a segment, 4 n anywhere, so that maps take at most a half of the rows' disk.
    """
    ends = {segment.stop for segment in plan.segments}
    parts, first, count = [], plan.steps.start, 0
    for step in plan.steps:
        count += len(plan.trajectory.lines[step].examples)
        if count >= 4 * size or (count >= 2 * size and step + 1 in ends):
            parts.append((first, step + 1))
            first, count = step + 1, 0
    return [*parts, (first, plan.steps.stop)] if first < plan.steps.stop else parts


def short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
