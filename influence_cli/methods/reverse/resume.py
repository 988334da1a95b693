"""Saves the progress of a reverse pass now and then, so that an interrupted run can resume.

CACHE/back/DIGEST/scores-000090-000120.safetensors   effects of the steps 90 to 119
CACHE/back/DIGEST/carried.safetensors                the adjoint before the last of these steps
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import checkpoint_key
from influence_cli.cache.unit_file import open_tensor_file
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.options import ReverseOptions
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import StepEffects, step_slices
from influence_cli.storage.atomic import report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors

SAVE_SECONDS = 30.0  # between two saves


class PassProgress:
    """The progress of one reverse pass on disk. `folder` None: nothing is saved."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.stop: int | None = None  # the pass resumes below this step
        self._start_norms = torch.empty(0)
        self._unsaved: list[StepEffects] = []
        self._saved_at = time.monotonic()

    def restore(self, adjoint: Adjoint, start_norms: Tensor) -> Tensor:
        """Load the adjoint of an interrupted run, and set `stop`.

        Returns the norms at the end of training: the saved ones, or `start_norms` if nothing was
        saved.
        """
        self._start_norms = start_norms
        if self.folder is None or not (self.folder / "carried.safetensors").is_file():
            return start_norms
        with open_tensor_file(self.folder / "carried.safetensors") as file:
            content = file.read(list(file.entries))
        for kind, state in adjoint.states.items():
            for name, value in state.items():
                value.copy_(content[f"{kind}:{name}"])
        self.stop, self._start_norms = int(content["step"]), content["start"]
        return self._start_norms

    def saved_effects(self) -> Iterator[StepEffects]:
        """The effects of the steps from `stop`, last step first."""
        if self.folder is None or self.stop is None:
            return
        for path in sorted(self.folder.glob("scores-*.safetensors"), reverse=True):
            if int(path.stem.split("-")[1]) < self.stop:
                continue  # the process was killed before it saved the adjoint
            with open_tensor_file(path) as file:
                yield from unpack_effects(file.read(list(file.entries)))

    def add(self, adjoint: Adjoint, effects: StepEffects) -> None:
        """Record the effects of a step, and save if the last save was long ago."""
        if self.folder is None:
            return
        values = {name: value.cpu() for name, value in effects.values.items()}
        self._unsaved.append(
            StepEffects(effects.step, effects.checkpoint, effects.examples, values)
        )
        if time.monotonic() - self._saved_at >= SAVE_SECONDS:
            self._save(adjoint, self.folder)
            self._saved_at = time.monotonic()

    def _save(self, adjoint: Adjoint, folder: Path) -> None:
        """Write the effects first: a run resumes from the adjoint."""
        first, last = self._unsaved[-1].step, self._unsaved[0].step
        tensors = {
            f"{kind}:{name}": value.cpu()
            for kind, state in adjoint.states.items()
            for name, value in state.items()
        }
        tensors |= {"step": torch.tensor(first), "start": self._start_norms}
        with report_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"scores-{first:06d}-{last + 1:06d}.safetensors"
            write_tensors(path, pack_effects(self._unsaved), {})
            write_tensors(folder / "carried.safetensors", tensors, {})
        self._unsaved = []

    def discard(self) -> None:
        """Delete what was saved: the pass is complete."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def pack_effects(effects: list[StepEffects]) -> dict[str, Tensor]:
    """Tensors of the effects of some steps, one row per entry."""

    def per_entry(values: list[int]) -> Tensor:
        counts = torch.tensor([len(entry.examples) for entry in effects])
        return torch.tensor(values).repeat_interleave(counts)

    content = {
        f"values:{name}": torch.cat([entry.values[name] for entry in effects])
        for name in effects[0].values
    }
    content["step"] = per_entry([entry.step for entry in effects])
    content["checkpoint"] = per_entry([entry.checkpoint for entry in effects])
    content["example"] = torch.from_numpy(np.concatenate([entry.examples for entry in effects]))
    return content


def unpack_effects(content: dict[str, Tensor]) -> Iterator[StepEffects]:
    """The effects of each step, last step first."""
    values = {
        name.removeprefix("values:"): value
        for name, value in content.items()
        if name.startswith("values:")
    }
    for step, rows in step_slices(content["step"].numpy()):
        yield StepEffects(
            step,
            int(content["checkpoint"][rows.start]),
            content["example"].numpy()[rows],
            {name: value[rows] for name, value in values.items()},
        )


def progress_folder(
    source: GradientSource,
    plan: ReversePlan,
    rows: GradientRows,
    options: ReverseOptions,
    method: str,
    by_layer: bool,
) -> Path | None:
    """The folder of a pass with these queries and options; None without a cache."""
    if source.cache is None:
        return None
    store = source.cache.store
    digest = hashlib.sha256()
    for name in plan.columns:
        digest.update(name.encode() + rows.forms[name].dense().values.numpy().tobytes())
    memory = store.folder / "checkpoints.json"
    identity = [
        method,
        repr(options),
        by_layer,
        source.run.definition.digest,
        source.settings.key,
        hashlib.sha256(plan.trajectory.path.read_bytes()).hexdigest(),
        [
            (segment.first, segment.stop, checkpoint_key(segment.checkpoint, memory))
            for segment in plan.segments
        ],
    ]
    digest.update(json.dumps(identity).encode())
    return store.folder / "back" / digest.hexdigest()[:16]
