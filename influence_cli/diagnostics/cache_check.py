"""Checks the cache: reads every unit completely, and computes some of its gradients again."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.cache.identity import check_rows_agree, checkpoint_key
from influence_cli.cache.quantize import STORE_EPS
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import Unit, open_tensor_file, read_unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.diagnostics.finding import CHECKPOINTS, EXAMPLES, Finding
from influence_cli.errors import CacheError, CheckpointError, counted
from influence_cli.extraction import revalidate
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form, Projected
from influence_cli.gradients.tolerances import rounding
from influence_cli.run.checkpoints import Checkpoint

# of units: training examples, queries, and rows of the command line
UNIT_FOLDERS = tuple(
    f"*/step-*/{split}" for split in ("train", "query/*", "query-*/*", "train-*/*")
)


def check_cache(source: GradientSource, checkpoints: Sequence[Checkpoint]) -> Iterator[Finding]:
    """One finding per folder of units, and one per checkpoint whose gradients are computed
    again.
    """
    if source.cache is None:
        return
    store = source.cache.store
    folders = sorted(folder for kind in UNIT_FOLDERS for folder in store.folder.glob(kind))
    with source.reporter.progress("checking cache files", len(folders)) as advance:
        for folder in folders:
            yield check_folder(store, folder)
            advance(1)
    if finding := check_other_files(store):
        yield finding
    yield check_checkpoints(store, checkpoints)
    for position in spread_evenly(len(checkpoints), CHECKPOINTS):
        checkpoint = checkpoints[position]
        folder = source.cache.folder("train", checkpoint)
        units = [
            unit
            for unit in source.cache.index("train", checkpoint).units
            if all(map(source.run.has, unit.columns))
        ]
        if units:
            yield check_recomputed(source, checkpoint, folder, UnitIndex(units))


def check_folder(store: Store, folder: Path) -> Finding:
    """Compares the norms of the gradients with the norms that were stored beside them.

    The stored norms are exact. Projected gradients have other norms and are only read.
    """
    subject = str(folder.relative_to(store.folder))
    split = "query" if any(part.startswith("query") for part in Path(subject).parts) else "train"
    eps = STORE_EPS[getattr(torch, subject.split("-stored-")[1].split("-")[0])]
    allowed = max(4 * eps, rounding(torch.float32) if eps > 1e-12 else rounding(torch.float64))
    worst, files, examples = 0.0, 0, 0
    try:
        for unit in store.index_units(folder).units:
            rows = read_unit(unit, unit.columns, unit.level, unit.example_ids)
            for name in unit.columns:
                error = norm_error(rows, unit, name)
                if not error <= allowed:
                    note = f"{unit.path.name}: the gradients of {name} do not have their norms"
                    return Finding("cache", split, subject, error, allowed, note)
                worst = max(worst, error)
            files, examples = files + 1, examples + len(rows.ids)
    except CacheError as error:
        return Finding("cache", split, subject, math.nan, allowed, describe_damage(error))
    note = f"{counted(files, 'file')}, {counted(examples, 'example')}"
    return Finding("cache", split, subject, worst, allowed, note)


def check_checkpoints(store: Store, checkpoints: Sequence[Checkpoint]) -> Finding:
    """Compares checkpoints with the digests that the cache has of files with their time stamps."""
    for checkpoint in checkpoints:
        try:
            checkpoint_key(checkpoint, store.folder / "checkpoints.json", compare=True)
        except CheckpointError as error:
            return Finding("cache", "train", checkpoint.name, math.nan, 0.0, describe_damage(error))
    note = counted(len(checkpoints), "checkpoint")
    return Finding("cache", "train", "checkpoints", 0.0, 0.0, note)


def check_other_files(store: Store) -> Finding | None:
    """Compares the files that are not units (saved progress, embeddings) with their checksums; None
    where there are none."""
    units = {path for kind in UNIT_FOLDERS for path in store.folder.glob(f"{kind}/*/*")}
    files = [
        path
        for path in sorted(store.folder.rglob("*.safetensors"))
        if path not in units and not path.name.startswith(".tmp-")
    ]
    for path in files:
        try:
            with open_tensor_file(path) as file:
                for name in file.entries:  # one at a time, in flat memory
                    file.verify(file.read([name]))
        except CacheError as error:
            subject = str(path.relative_to(store.folder))
            return Finding("cache", "train", subject, math.nan, 0.0, describe_damage(error))
    if not files:
        return None
    return Finding("cache", "train", "other files", 0.0, 0.0, counted(len(files), "file"))


def describe_damage(error: CacheError | CheckpointError) -> str:
    return "; ".join((error.headline, *error.details[:1]))


def norm_error(rows: GradientRows, unit: Unit, name: str) -> float:
    """The largest difference of norms, relative to the largest norm."""
    norms = rows.sqnorms[name].sqrt()
    stored = norms
    if unit.level == "values" and is_exact(rows.forms[name]):
        stored = rows.forms[name].sqnorm().sqrt()
    return float(((stored - norms).abs() / norms.max().clamp(min=1e-30)).max())


def is_exact(form: Form) -> bool:
    """Whether the form holds every gradient value: it is not projected, or to as many numbers."""
    return not isinstance(form, Projected) or form.values.shape[1] == math.prod(form.shape)


def check_recomputed(
    source: GradientSource, checkpoint: Checkpoint, folder: Path, index: UnitIndex
) -> Finding:
    """Compares all items of the units with the dataset, and some of their gradients with gradients
    computed now.
    """
    assert source.cache is not None
    store, allowed = source.cache.store, source.settings.rounding
    subject, count = f"{checkpoint.name}, recomputed", 0
    try:
        revalidate.check_items(
            source.run, "train", {folder: index}, store, source.reporter, all_items=True
        )
        for unit, ids in revalidate.sample_rows(index.units, EXAMPLES, len(source.run.train)):
            stored = UnitIndex([unit]).read_rows(unit.columns, unit.level, ids)
            computed = source.recompute("train", checkpoint, unit.columns, ids)
            check_rows_agree(stored, computed, allowed, checkpoint.name, "train", store.folder)
            count += len(ids)
    except CacheError as error:
        return Finding("cache", "train", subject, math.nan, allowed, describe_damage(error))
    return Finding(
        "cache", "train", subject, 0.0, allowed, f"{counted(count, 'gradient')} compared"
    )
