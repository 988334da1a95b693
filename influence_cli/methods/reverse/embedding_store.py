"""Data value embeddings on disk: the effect of each occurrence on every number of the final state.

DIR/embeddings.json              what the embeddings depend on (embedding_identity.py)
DIR/sample.safetensors           losses and norms of a few training examples, to detect a change of
                                 the definition
DIR/part-000000-000120/          the steps of a part, computed from the identity at its end
  rows-000090-000120.safetensors per occurrence (M, S): its effect on the state at the part's end,
                                 with its step and example
  map.safetensors                (S, S): from the adjoint at the part's end to that at its start;
                                 written last. Its header lists the files of rows

Nothing is deleted: two jobs that build one folder write the same files.

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

from influence_cli.cache.unit_file import open_tensor_file, report_damage
from influence_cli.errors import CacheError, UsageProblem, listed
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.dve import DveOptions
from influence_cli.methods.reverse.saved_file import check_values, read_saved
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.stability import check_finite
from influence_cli.methods.reverse.steps import StepEffects, step_slices
from influence_cli.storage.atomic import make_folders, report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors

Part = tuple[int, int]  # first step, stop
ROW_FILES = "rows"  # of a map's metadata: first step and stop of each file of rows, as JSON


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
        self.identity = ""  # of what the embeddings depend on; check_identity sets it

    @property
    def dtype(self) -> torch.dtype:
        is_double = self.source.settings.storage_dtype == torch.float64
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

    def rows_path(self, part: Part, steps: Part) -> Path:
        return self.part_folder(part) / f"rows-{steps[0]:06d}-{steps[1]:06d}.safetensors"

    def map_path(self, part: Part) -> Path:
        return self.part_folder(part) / "map.safetensors"

    def describe(self, kind: str, steps: Part) -> dict[str, str]:
        """The metadata of a file of these steps."""
        return {
            "identity": self.identity,
            "kind": kind,
            "steps": f"{steps[0]}-{steps[1]}",
            "columns": json.dumps(self.widths),
        }

    def is_complete(self, part: Part) -> bool:
        """Whether a part has its map, and the files of rows that the map lists."""
        if not self.map_path(part).is_file():
            return False
        return all(self.rows_path(part, steps).is_file() for steps in self.row_files(part))

    def row_files(self, part: Part) -> list[Part]:
        """The steps of each file of rows, last first.

        Raises CacheError where the files do not tile the part without gap or overlap.
        """
        path = self.map_path(part)
        with open_tensor_file(path) as file:
            files = [(int(first), int(end)) for first, end in json.loads(file.metadata[ROW_FILES])]
            stop = part[1]
            for first, end in files:
                if end != stop or not part[0] <= first < end:
                    raise ValueError(f"its files of rows do not tile the steps below {stop}")
                stop = first
            if self.plan.count_occurrences(range(part[0], stop)):
                raise ValueError(f"it has no rows of the steps below {stop}")
        return files

    def make_part(self, part: Part) -> None:
        """Make the folder of a part. Raises CacheError for a link, where it would write."""
        folder = self.part_folder(part)
        if folder.is_symlink():
            raise CacheError(
                f"{folder} is a symbolic link, and its embeddings are incomplete",
                "delete the link: influence writes to no folder behind a link",
            )
        with report_disk_errors(self.folder):
            make_folders(folder, self.folder)

    def write_rows(self, part: Part, stop: int, effects: list[StepEffects]) -> Part:
        """Write the rows of the neighbouring steps below `stop`, last first. Returns the steps."""
        steps = effects[-1].step, stop
        step_numbers = [np.full(len(entry.examples), entry.step) for entry in effects]
        content = {
            "step": torch.from_numpy(np.concatenate(step_numbers)),
            "example": torch.from_numpy(np.concatenate([entry.examples for entry in effects])),
            "values": torch.cat([entry.values[""].cpu() for entry in effects]),
        }
        self.write(self.rows_path(part, steps), content, self.describe("rows", steps))
        return steps

    def write_map(self, part: Part, map_SS: Tensor, files: list[Part]) -> None:
        """Write the map of a part, after its files of rows: it completes the part."""
        metadata = self.describe("map", part) | {ROW_FILES: json.dumps(files)}
        self.write(self.map_path(part), {"map": map_SS}, metadata)

    def write(self, path: Path, content: dict[str, Tensor], metadata: dict[str, str]) -> None:
        with report_disk_errors(self.folder):
            write_tensors(path, content, metadata)

    def step_effects(self, gradients: dict[str, Tensor], end: int) -> Iterator[StepEffects]:
        """The effects of the steps below `end` on queries, last step first, in one sum.

        `gradients` (Q, D) per parameter: those of the queries at the checkpoint of step `end`.
        """
        values = [value.cpu().to(self.dtype) for value in gradients.values()]
        state_QS = torch.cat(values, dim=1)
        missing = self.state_size - state_QS.shape[1]  # no query depends on a momentum buffer
        state_QS = torch.cat([state_QS, state_QS.new_zeros(len(state_QS), missing)], dim=1)
        for part in reversed([part for part in self.parts if part[1] <= end]):
            quantities = self.quantities(part)
            for steps in self.row_files(part):
                yield from self.read_effects(part, steps, state_QS[:, :quantities])
            path = self.map_path(part)
            map_SS = read_saved(path, self.describe("map", part))["map"]
            with report_damage(path):
                check_values("map", map_SS, (quantities, self.state_size))
            state_QS = state_QS[:, :quantities] @ map_SS

    def quantities(self, part: Part) -> int:
        """The numbers of the state at a part's end that the queries depend on.

        At the end of training they are the numbers of the parameters.
        """
        widths = list(self.widths.values())
        return sum(widths[: len(self.plan.columns)] if part == self.parts[-1] else widths)

    def read_effects(self, part: Part, steps: Part, state_QK: Tensor) -> Iterator[StepEffects]:
        """The effects of the steps in a file of rows."""
        path = self.rows_path(part, steps)
        content = read_saved(path, self.describe("rows", steps))
        steps_M, examples_M = self.plan.occurrences(range(*steps))
        with report_damage(path):
            if not (
                np.array_equal(content["step"].numpy(), steps_M)
                and np.array_equal(content["example"].numpy(), examples_M)
            ):
                raise ValueError("it has rows of other steps or examples")
            rows_MK = content["values"]
            check_values("values", rows_MK, (len(steps_M), state_QK.shape[1]))
        effects_MQ = rows_MK @ state_QK.T
        for step, rows in step_slices(steps_M):
            checkpoint = self.plan.segment_at(step).checkpoint.step
            check_finite(effects_MQ[rows], step, checkpoint)
            yield StepEffects(step, checkpoint, examples_M[rows], {"": effects_MQ[rows]})


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
