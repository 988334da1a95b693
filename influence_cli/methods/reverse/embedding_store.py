"""Data value embeddings on disk: the effect of each occurrence on every number of the final state.

DIR/embeddings.json              what the embeddings depend on (embedding_identity.py)
DIR/sample.safetensors           losses and norms of a few training examples, to detect a change of
                                 the definition
DIR/part-000000-000120/          the steps of a part, computed from the identity at its end
  rows-000090-000120.safetensors per occurrence (M, S): its effect on the state at the part's end,
                                 with its step and example
  map.safetensors                (S, S): from the adjoint at the part's end to that at its start;
                                 written last

The state is the parameters, and the momentum buffers if the optimizer has some: S numbers. Parts
are computed in parallel. To score a query, its gradient at the end of training is multiplied by
the rows of the last part, then by the map of that part, then by the rows of the part before. So
`--at` can explain the end of any part by reading alone.

Letters: B entries of a step, M occurrences, Q queries, S numbers of the state.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.unit_file import open_tensor_file
from influence_cli.errors import UsageProblem, listed
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.dve import DveOptions
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import StepEffects, step_slices
from influence_cli.storage.atomic import report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors

Part = tuple[int, int]  # first step, stop


class EmbeddingStore:
    """The folder with the embeddings of all steps of a plan."""

    def __init__(
        self, folder: Path, source: GradientSource, plan: ReversePlan, options: DveOptions
    ) -> None:
        self.folder, self.source, self.plan, self.options = folder, source, plan, options
        self.with_momentum = plan.with_momentum
        self.widths = {
            name: source.settings.width(column) for name, column in plan.columns.items()
        } | {
            f"momentum of {name}": source.settings.width(plan.columns[name])
            for name in self.with_momentum
        }
        self.state_size = sum(self.widths.values())
        self.parts = cut_parts(plan, self.state_size)

    @property
    def dtype(self) -> torch.dtype:
        is_double = self.source.settings.store == torch.float64
        return torch.float64 if is_double else torch.float32

    def check_part_ends_at(self, step: int) -> None:
        """Raise UsageProblem if `step` is inside a part."""
        stops = [stop for _, stop in self.parts]
        if step not in stops:
            raise UsageProblem(
                f"--at {step}: embeddings exist for the steps {listed(stops, 20)}",
                "choose one of these, or leave out --embeddings",
            )

    def part_folder(self, part: Part) -> Path:
        return self.folder / f"part-{part[0]:06d}-{part[1]:06d}"

    def is_complete(self, part: Part) -> bool:
        """Whether a part has its map, and rows for all of its occurrences."""
        folder = self.part_folder(part)
        spans = [
            range(*map(int, path.stem.split("-")[1:]))
            for path in folder.glob("rows-*-*.safetensors")
        ]
        rows = sum(self.plan.count_occurrences(span) for span in spans)
        has_map = (folder / "map.safetensors").is_file()
        return has_map and rows == self.plan.count_occurrences(range(*part))

    def clear_part(self, part: Part) -> None:
        """Make the folder of a part, or delete its files."""
        with report_disk_errors(self.folder):
            self.part_folder(part).mkdir(parents=True, exist_ok=True)
            for path in self.part_folder(part).iterdir():
                path.unlink()

    def write_rows(self, part: Part, effects: list[StepEffects]) -> None:
        """Write the rows of some neighbouring steps, last step first."""
        steps = np.concatenate([np.full(len(entry.examples), entry.step) for entry in effects])
        examples = np.concatenate([entry.examples for entry in effects])
        content = {
            "step": torch.from_numpy(steps),
            "example": torch.from_numpy(examples),
            "values": torch.cat([entry.values[""].cpu() for entry in effects]),
        }
        name = f"rows-{steps.min():06d}-{steps.max() + 1:06d}.safetensors"
        self.write(self.part_folder(part) / name, content)

    def write_map(self, part: Part, map_SS: Tensor) -> None:
        """Write the map of a part, after its rows: it completes the part."""
        self.write(self.part_folder(part) / "map.safetensors", {"map": map_SS})

    def write(self, path: Path, content: dict[str, Tensor]) -> None:
        """Write a file whose header lists the widths of the state's columns."""
        with report_disk_errors(self.folder):
            write_tensors(path, content, {"columns": json.dumps(self.widths)})

    def step_effects(self, gradients: dict[str, Tensor], end: int) -> Iterator[StepEffects]:
        """The effects of the steps below `end` on queries, last step first, in one sum.

        `gradients` (Q, D) per parameter: those of the queries at the checkpoint of step `end`.
        """
        values = [value.cpu().to(self.dtype) for value in gradients.values()]
        state_QS = torch.cat(values, dim=1)
        missing = self.state_size - state_QS.shape[1]  # no query depends on a momentum buffer
        state_QS = torch.cat([state_QS, state_QS.new_zeros(len(state_QS), missing)], dim=1)
        for part in reversed([part for part in self.parts if part[1] <= end]):
            paths = self.part_folder(part).glob("rows-*.safetensors")
            for path in sorted(paths, reverse=True):
                yield from self.read_effects(path, state_QS)
            with open_tensor_file(self.part_folder(part) / "map.safetensors") as file:
                map_SS = file.read(["map"])["map"]
            state_QS = state_QS[:, : len(map_SS)] @ map_SS

    def read_effects(self, path: Path, state_QS: Tensor) -> Iterator[StepEffects]:
        """The effects of the steps in a file of rows."""
        with open_tensor_file(path) as file:
            content = file.read(["step", "example", "values"])
        rows_MS, examples = content["values"], content["example"].numpy()
        effects_MQ = rows_MS @ state_QS[:, : rows_MS.shape[1]].T
        for step, rows in step_slices(content["step"].numpy()):
            checkpoint = self.plan.segment_at(step).checkpoint.step
            yield StepEffects(step, checkpoint, examples[rows], {"": effects_MQ[rows]})


def cut_parts(plan: ReversePlan, state_size: int) -> list[Part]:
    """Cut the steps into parts that can be computed in parallel.

    A part has at least 2 S occurrences if it ends with a segment, else 4 S. So maps take at most
    half of the disk space of the rows.
    """
    ends = {segment.stop for segment in plan.segments}
    parts, first, count = [], plan.steps.start, 0
    for step in plan.steps:
        count += len(plan.trajectory.lines[step].examples)
        if count >= 4 * state_size or (count >= 2 * state_size and step + 1 in ends):
            parts.append((first, step + 1))
            first, count = step + 1, 0
    return [*parts, (first, plan.steps.stop)] if first < plan.steps.stop else parts
