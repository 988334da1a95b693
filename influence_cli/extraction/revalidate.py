"""Are cached rows still valid? Compares cached items and gradients with the run as it is now."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.cache.identity import check_items_agree, check_rows_agree
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import Unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.errors import CacheError, listed, shown
from influence_cli.progress import Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import Run
from influence_cli.storage.atomic import read_json, report_disk_errors, write_json

GRADIENTS = 8  # examples to compute again, per checkpoint and older definition
ITEMS = 1024  # items to read again, per split, while the definition is unchanged
# (split, checkpoint, columns, ids) -> rows
Recompute = Callable[[str, Checkpoint, Sequence[str], np.ndarray], GradientRows]


def trusted_definitions(folder: Path, digest: str) -> set[str]:
    """Digests of definitions whose units are valid under this one: itself, and those compared
    before.
    """
    path = folder / "agrees.json"
    compared = read_json(path).get(digest, []) if path.is_file() else []
    if not isinstance(compared, list) or not all(isinstance(name, str) for name in compared):
        raise CacheError(
            f"{path} is broken",
            f"expected: a list of digests; found: {shown(compared)}",
            "delete that file: influence compares the definitions again",
        )
    return {digest, *compared}


def check_gradients(
    run: Run,
    checkpoint: Checkpoint,
    folder: Path,
    index: UnitIndex,
    store: Store,
    rounding: float,
    recompute: Recompute,
) -> bool:
    """Compare training gradients that were cached under other texts of the definition, once for
    each text; True where there were any.

    agrees.json keeps the result. Raises CacheError, naming layer and example, where they differ.
    """
    digest = run.definition.digest
    trusted = trusted_definitions(folder, digest)
    older = sorted({unit.definition for unit in index.units} - trusted)
    for definition in older:
        units = [unit for unit in index.units if unit.definition == definition]
        for unit, ids in sample_rows(units, GRADIENTS, len(run.train)):
            check_columns_exist(run, unit, store)
            stored = UnitIndex([unit], store.verification).read_rows(unit.columns, unit.level, ids)
            fresh = recompute("train", checkpoint, unit.columns, ids)
            check_rows_agree(stored, fresh, rounding, checkpoint.name, "train", store.folder)
    if older:
        with report_disk_errors(store.folder):
            write_json(folder / "agrees.json", {digest: sorted(trusted.union(older) - {digest})})
    return bool(older)


def check_columns_exist(run: Run, unit: Unit, store: Store) -> None:
    absent = [column for column in unit.columns if not run.has(column)]
    if absent:
        raise CacheError(
            f"the cache {store.folder} belongs to another run",
            f"it has gradients of {listed(absent)}, which the model does not train",
            "--cache DIR names another cache; or delete the old one",
        )


def check_items(
    run: Run,
    split: str,
    indexes: Mapping[Path, UnitIndex],
    store: Store,
    reporter: Reporter,
    all_items: bool = False,
) -> None:
    """Compare the items behind cached rows with the dataset.

    It compares all items where `all_items` says so, or where a unit was cached under a definition
    that is not trusted yet; otherwise ITEMS of them, evenly spaced. It reads each item once, over
    all checkpoints. `indexes`: per folder. Raises CacheError naming the first item that differs.
    """
    units = [unit for index in indexes.values() for unit in index.units]
    if not units:
        return
    changed = any(
        {unit.definition for unit in index.units}
        - trusted_definitions(folder, run.definition.digest)
        for folder, index in indexes.items()
    )
    stop = min(len(run.examples(split)), max(unit.stop for unit in units))
    if all_items or changed or stop <= ITEMS:
        sample = np.arange(stop)
    else:
        sample = np.array(spread_evenly(stop, ITEMS))
    with reporter.progress(f"comparing {split} examples with the cache", len(sample)) as advance:
        for first in range(0, len(sample), ITEMS):
            ids = sample[first : first + ITEMS]
            check_item_digests(run, split, units, ids, store)
            advance(len(ids))


def check_item_digests(
    run: Run, split: str, units: Sequence[Unit], ids: np.ndarray, store: Store
) -> None:
    digests: torch.Tensor | None = None
    for unit in units:
        stored = unit.find_rows(ids) >= 0
        if stored.any():
            digests = run.examples(split).digests(ids) if digests is None else digests
            rows = UnitIndex([unit], store.verification).read_rows(
                unit.columns[:1], "norms", ids[stored]
            )
            check_items_agree(rows, digests[torch.from_numpy(stored)], split, store.folder)


def sample_rows(
    units: Sequence[Unit], limit: int, split_size: int
) -> Iterator[tuple[Unit, np.ndarray]]:
    """About `limit` examples below `split_size`, evenly spaced over the units and within each."""
    numbers = spread_evenly(len(units), limit)
    per_unit = math.ceil(limit / len(numbers))
    for number in numbers:
        unit = units[number]
        ids = unit.example_ids[unit.example_ids < split_size]
        if len(ids):
            yield unit, ids[spread_evenly(len(ids), per_unit)]
