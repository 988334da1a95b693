"""Saves the progress of a reverse pass now and then, so that an interrupted run can resume.

CACHE/back/DIGEST/scores-000090-000120.safetensors   effects of the steps 90 to 119
CACHE/back/DIGEST/carried-000090.safetensors         the adjoint before step 90

Jobs that ask the same question share the folder. A run resumes only from files that tile the steps
without gap or overlap (`find_chain`), and it checks all that it reads. It computes whatever else
it needs again. So a job may delete its files while another one reads them.
"""

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import checkpoint_key
from influence_cli.cache.unit_file import report_damage
from influence_cli.errors import CacheError
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.options import ReverseOptions
from influence_cli.methods.reverse.saved_file import check_values, read_saved
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.steps import StepEffects, step_slices
from influence_cli.progress import Reporter
from influence_cli.run.optimizer_state import find_state
from influence_cli.storage.atomic import make_folders, remove_stale_files, report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors

VERSION = 2  # of the saved numbers: 2 scales the adjoint of tiny and huge queries
SAVE_SECONDS = 30.0  # between two saves
ATTEMPTS = 20  # to save, while other jobs delete the folder
FILE_NAME = re.compile(r"(?:scores-(\d+)-(\d+)|carried-(\d+))\.safetensors")
Steps = tuple[int, int]  # first step, stop


class PassProgress:
    """The progress of one reverse pass on disk. `folder` None: nothing is saved.

    `identity`: of the question. `stop`: the adjoint is that before this step. `reached`:
    `restore` has yielded the effects of the steps from here on.
    """

    def __init__(
        self, folder: Path | None, plan: ReversePlan, reporter: Reporter, identity: str = ""
    ) -> None:
        self.folder, self.plan, self.reporter, self.identity = folder, plan, reporter, identity
        self.stop = self.reached = plan.steps.stop
        self._unsaved: list[StepEffects] = []
        self._saved_at = time.monotonic()
        self._adjoint_path: Path | None = None  # the last one that this job wrote or read
        self._refused: set[Path] = set()

    def restore(self, adjoint: Adjoint, layers: Iterable[str]) -> Iterator[StepEffects]:
        """Yield the saved effects, last step first; then load the adjoint and set `stop`.

        `layers`: the names of the effects. If the adjoint can't be read, `stop` stays at the end of
        training: the pass computes all steps again.
        """
        if self.folder is None:
            return
        names = list(layers) or [""]
        queries = len(next(iter(adjoint.theta.values())))
        while (chain := self._find_saved()) is not None:
            for steps in chain:
                if (effects := self._read_effects(steps, names, queries)) is None:
                    break
                yield from effects
                self.reached = steps[0]
            else:
                if self._load_adjoint(adjoint):
                    self.stop = self.reached
                    return

    def _find_saved(self) -> list[Steps] | None:
        """The saved steps that continue below `reached`, up to an adjoint, last first."""
        assert self.folder is not None
        tiles, adjoints = set[Steps](), set[int]()
        for path in list_saved(self.folder):
            match = FILE_NAME.fullmatch(path.name)
            if match is None or path in self._refused:
                continue
            if match[3]:
                adjoints.add(int(match[3]))
            else:
                tiles.add((int(match[1]), int(match[2])))
        return find_chain(tiles, adjoints, self.reached, self.plan.steps)

    def _read_effects(
        self, steps: Steps, names: list[str], queries: int
    ) -> list[StepEffects] | None:
        """The effects of these steps, last first. None where the file is missing or damaged."""
        path = self._effects_path(steps)
        try:
            content = read_saved(path, self._describe("scores", steps))
            with report_damage(path):
                return self._unpack(content, steps, names, queries)
        except CacheError as error:
            self._refuse(path, error)
            return None

    def _unpack(
        self, content: dict[str, Tensor], steps: Steps, names: list[str], queries: int
    ) -> list[StepEffects]:
        """Raises ValueError for other steps or examples than those of the plan."""
        steps_M, examples_M = self.plan.occurrences(range(*steps))
        if content.keys() != {f"values:{name}" for name in names}:
            raise ValueError(f"it has the tensors {', '.join(content)}")
        for name, value in content.items():
            check_values(name, value, (len(steps_M), queries))
        return [
            StepEffects(
                step,
                self.plan.segment_at(step).checkpoint.step,
                examples_M[rows],
                {name: content[f"values:{name}"][rows] for name in names},
            )
            for step, rows in step_slices(steps_M)
        ]

    def _load_adjoint(self, adjoint: Adjoint) -> bool:
        """Load the adjoint before the step `reached`. False where the file can't be used."""
        path = self._carried_path(self.reached)
        expected = adjoint_tensors(adjoint)
        try:
            content = read_saved(path, self._describe("carried", (self.reached, self.reached)))
            with report_damage(path):
                if content.keys() != expected.keys():
                    raise ValueError(f"it has the tensors {', '.join(content)}")
                for name, value in expected.items():
                    check_values(name, content[name], tuple(value.shape))
        except CacheError as error:
            self._refuse(path, error)
            return False
        for name, value in expected.items():
            value.copy_(content[name])
        self._adjoint_path = path
        return True

    def _refuse(self, path: Path, error: CacheError) -> None:
        """Use another file. A note says so, unless another job deleted this one."""
        self._refused.add(path)
        if path.exists():
            reason = "; ".join((error.headline, *error.details[:1]))
            self.reporter.note(f"saved progress is computed again: {reason}")

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
        steps = self._unsaved[-1].step, self.stop
        content = {
            f"values:{name}": torch.cat([entry.values[name] for entry in self._unsaved])
            for name in self._unsaved[0].values
        }
        carried = self._carried_path(steps[0])
        with report_disk_errors(folder):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    make_folders(folder, folder.parent.parent)
                    write_tensors(
                        self._effects_path(steps), content, self._describe("scores", steps)
                    )
                    where = self._describe("carried", (steps[0], steps[0]))
                    write_tensors(carried, adjoint_tensors(adjoint), where)
                    break
                except FileNotFoundError:  # a job that finished deleted the folder
                    if attempt == ATTEMPTS:
                        raise
            if self._adjoint_path not in (None, carried):
                self._adjoint_path.unlink(missing_ok=True)
        self._adjoint_path, self.stop, self._unsaved = carried, steps[0], []

    def discard(self) -> None:
        """Delete what was saved: the pass is complete. No link is followed."""
        if self.folder is None or not self.folder.is_dir() or self.folder.is_symlink():
            return
        remove_stale_files(self.folder)
        with contextlib.suppress(OSError):  # another job writes here, or deleted the folder
            for path in list_saved(self.folder):
                if FILE_NAME.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            self.folder.rmdir()

    def _describe(self, kind: str, steps: Steps) -> dict[str, str]:
        return {"identity": self.identity, "kind": kind, "steps": f"{steps[0]}-{steps[1]}"}

    def _effects_path(self, steps: Steps) -> Path:
        assert self.folder is not None
        return self.folder / f"scores-{steps[0]:06d}-{steps[1]:06d}.safetensors"

    def _carried_path(self, step: int) -> Path:
        assert self.folder is not None
        return self.folder / f"carried-{step:06d}.safetensors"


def list_saved(folder: Path) -> list[Path]:
    """The files of a folder; none where it does not exist."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def find_chain(
    tiles: set[Steps], adjoints: set[int], stop: int, steps: range
) -> list[Steps] | None:
    """The tiles that lead from `stop` down to the earliest adjoint, without gap or overlap.

    Last tile first. None where no adjoint can be reached. Two jobs save at different steps, so
    several chains can exist.
    """
    above: dict[int, int | None] = {stop: None}  # first step of a tile -> its stop
    for first, end in sorted(tiles, key=lambda tile: -tile[1]):
        if end in above and steps.start <= first < end:
            above.setdefault(first, end)
    reachable = [step for step in above if step in adjoints]
    if not reachable:
        return None
    chain: list[Steps] = []
    lowest = min(reachable)
    while (stop_above := above[lowest]) is not None:
        chain.append((lowest, stop_above))
        lowest = stop_above
    return chain[::-1]


def adjoint_tensors(adjoint: Adjoint) -> dict[str, Tensor]:
    return {
        f"{kind}:{name}": value
        for kind, state in adjoint.states.items()
        for name, value in state.items()
    }


def open_progress(
    source: GradientSource,
    plan: ReversePlan,
    rows: GradientRows,
    options: ReverseOptions,
    method: str,
    by_layer: bool,
) -> PassProgress:
    """The progress of a pass with these queries and options. Without a cache it saves nothing."""
    if source.cache is None:
        return PassProgress(None, plan, source.reporter)
    store = source.cache.store
    digest = hashlib.sha256()
    for name in plan.columns:
        digest.update(name.encode() + rows.forms[name].dense().values.numpy().tobytes())
    memory = store.folder / "checkpoints.json"
    identity: list[object] = [
        VERSION,
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
    if options.replay:  # it starts from these states
        states = [
            find_state(source.run.folder, segment.checkpoint.step) for segment in plan.segments
        ]
        identity.append([checkpoint_key(state, memory) for state in states])
    digest.update(json.dumps(identity).encode())
    folder = store.folder / "back" / digest.hexdigest()[:16]
    return PassProgress(folder, plan, source.reporter, digest.hexdigest())
