"""Replays the recorded training with some labels changed, and keeps its checkpoints.

They are stored like the results of other protocols, so that the next command reuses them.
"""

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from influence_cli.errors import DefinitionError, UsageProblem
from influence_cli.evaluate.declaration import EvaluationRequest, describe_cost
from influence_cli.evaluate.result_log import ResultLog, total_seconds
from influence_cli.evaluate.retraining import check_trajectory, log_path, open_replay
from influence_cli.extraction.source import GradientSource
from influence_cli.run.checkpoint_loading import list_tensors
from influence_cli.run.checkpoints import Checkpoint, find_checkpoints
from influence_cli.run.definition import Definition
from influence_cli.storage.atomic import make_folders, report_disk_errors
from influence_cli.storage.safetensors_io import write_tensors
from influence_cli.storage.scratch import ScratchFolder


@dataclass(frozen=True)
class FlippedRun:
    """`source`: gradients of the run with changed labels, at its own checkpoints. `ids`: of the
    changed examples. `cost`: of the training.
    """

    source: GradientSource
    ids: np.ndarray
    cost: str
    files: ExitStack  # removes them, where there is no cache, when it is deleted


def replay_flipped(source: GradientSource, request: EvaluationRequest, share: float) -> FlippedRun:
    """The run, trained with this share of its labels changed.

    Raises DefinitionError where the definition can't change labels, UsageProblem for a share that
    changes none or all, TrajectoryError where the training can't be replayed.
    """
    run, files = source.run, ExitStack()
    check_trajectory(run, run.checkpoints[0], request.checkpoints[-1], "mislabel --flip")
    changed = flip_labels(source, share, request.seed)
    parts = [request.seed, sorted(changed), run.train.digest_of_all]
    path = log_path(source, request, "flipped", parts)
    log = ResultLog(path)
    folder = (
        files.enter_context(ScratchFolder(Path(tempfile.gettempdir())))
        if path is None
        else path.with_suffix("")
    )
    if run.checkpoints[0].step:
        source.reporter.note(
            f"the run has no checkpoint of step 0: the labels change after "
            f"{run.checkpoints[0].name}"
        )
    flipped = without_cache(source, dataclasses.replace(run, changed=changed))
    wanted = [folder / file_name(checkpoint) for checkpoint in request.checkpoints]
    if not log.records or not all(file.is_file() for file in wanted):
        with report_disk_errors(folder):
            seconds = save_replay(flipped, request, folder)
        log.add({"flipped": sorted(changed), "seconds": seconds})
    steps = {checkpoint.step for checkpoint in request.checkpoints}
    saved = tuple(c for c in find_checkpoints(run.folder, folder) if c.step in steps)
    trained = without_cache(source, dataclasses.replace(flipped.run, checkpoints=saved))
    cost = describe_cost(1, total_seconds(log.records[:1]))
    return FlippedRun(trained, np.array(sorted(changed)), cost, files)


def without_cache(source: GradientSource, run: Any) -> GradientSource:
    """The gradients of another run, computed as those of `source`, and not stored."""
    batch_size, cast = source.budget.requested_batch_size, source.extractor.batches.cast
    return GradientSource(
        run, source.settings, None, source.device, batch_size, cast, source.reporter
    )


def file_name(checkpoint: Checkpoint) -> str:
    return f"step-{checkpoint.step:06d}.safetensors"


def save_replay(source: GradientSource, request: EvaluationRequest, folder: Path) -> float:
    """Replay the run of `source`, and save a checkpoint at each requested step. Returns the
    seconds of the training.
    """
    start, end = source.run.checkpoints[0], request.checkpoints[-1]
    if request.folder is not None:
        make_folders(folder, request.folder)
    replay = open_replay(source)
    replay.start_from(start)
    started = perf_counter()
    with source.reporter.progress("retraining", end.step - start.step) as advance:
        for checkpoint in request.checkpoints:
            replay.advance(checkpoint.step, report_progress=advance)
            tensors = {
                id(value): (key, value)  # a tied tensor once, under its first name
                for key, value in reversed(list_tensors(source.run.model.module).items())
            }
            metadata = {"step": str(checkpoint.step)}
            write_tensors(folder / file_name(checkpoint), dict(tensors.values()), metadata)
    return perf_counter() - started


def flip_labels(source: GradientSource, share: float, seed: int) -> dict[int, Any]:
    """Examples with another label, by id: a random share of all, each with a random other class.

    relabel() gets class numbers from 0; there are as many classes as distinct labels.
    """
    run, definition = source.run, source.run.definition
    missing = [name for name in ("label", "relabel") if not definition.has(name)]
    if missing:
        raise DefinitionError(
            f"{definition.path.name} lacks {' and '.join(f'{name}()' for name in missing)}, so "
            "mislabel --flip can't change labels",
            "def relabel(example, label): return the example with this label, a class from 0 on",
            "known wrong labels need no change: --wrong FILE",
        )
    count = len(run.train)
    size = round(share * count) if 0 < share < 1 else 0
    if not 0 < size < count:
        raise UsageProblem(
            f"--flip {share:g} changes {'all' if share >= 0.5 else 'none'} of the {count:,} labels",
            "expected: a share between 0 and 1, such as 0.1",
        )
    with source.reporter.progress("labels", count) as advance:
        labels = set()
        for index in range(count):
            labels.add(run.train.label(index))
            advance(1)
    random = np.random.default_rng(seed)
    return {
        int(index): relabel_at_random(definition, run.train.item(index), len(labels), random)
        for index in np.sort(random.permutation(count)[:size])
    }


def relabel_at_random(
    definition: Definition,
    example: Any,  # the user's
    classes: int,
    random: np.random.Generator,
) -> Any:
    """The example with the first of the classes, in random order, that gives it another label."""
    label = str(definition.call("label", example))
    for number in random.permutation(classes):
        changed = definition.call("relabel", example, int(number))
        if str(definition.call("label", changed)) != label:
            return changed
    raise DefinitionError(
        f"relabel() in {definition.path.name} never changes the label {label!r} of an example",
        f"found: the same label(example) for each class from 0 to {classes - 1}",
        "expected: relabel(example, label) returns a copy with this label",
    )
