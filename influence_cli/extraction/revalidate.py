"""Does the cache still hold? Items and gradients that are there are compared with the run as it is now."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.identity import compare, compare_data
from influence_cli.cache.store import GradientRows, Store, Unit, UnitIndex
from influence_cli.errors import CacheError, listed
from influence_cli.progress import Reporter
from influence_cli.run import Checkpoint, Run
from influence_cli.storage.atomic import read_json, write_json, writing

GRADIENTS = 8  # examples taken again, per checkpoint and older definition
ITEMS = 1024  # items read again, per split, while the definition is the same
Capture = Callable[[str, Checkpoint, Sequence[str], np.ndarray], GradientRows]


def trusted(place: Path, now: str) -> set[str]:
    """Texts of the definition, by digest, whose units hold under the present one: it, and those that were compared and agree."""
    path = place / "agrees.json"
    known = read_json(path).get(now, []) if path.is_file() else []
    return {now, *known}


def verify(
    run: Run,
    split: str,
    checkpoint: Checkpoint,
    place: Path,
    held: UnitIndex,
    store: Store,
    rounding: float,
    capture: Capture,
) -> bool:
    """Compare gradients that were cached under other texts of the definition, once for each; True where that was done.

    What was found is kept in agrees.json. Raises CacheError, naming layer and example, where they differ.
    """
    now = run.definition.digest
    agreed = trusted(place, now)
    older = sorted({unit.definition for unit in held.units} - agreed)
    for definition in older:
        for unit, ids in sampled(
            [unit for unit in held.units if unit.definition == definition],
            GRADIENTS,
            len(run.examples(split)),
        ):
            gone = [column for column in unit.columns if not run.has(column)]
            if gone:
                raise CacheError(
                    f"the cache {store.folder} belongs to another run: the model has no trained parameter {listed(gone)}",
                    "--cache DIR starts another cache; deleting the old one starts afresh",
                )
            stored = UnitIndex([unit]).read(unit.columns, unit.level, ids)
            compare(
                stored,
                capture(split, checkpoint, unit.columns, ids),
                rounding,
                checkpoint.name,
                split,
                store.folder,
            )
    if older:
        with writing(store.folder):
            write_json(place / "agrees.json", {now: sorted(agreed.union(older) - {now})})
    return bool(older)


def verify_items(
    run: Run,
    split: str,
    everything: Mapping[Path, UnitIndex],
    store: Store,
    reporter: Reporter,
    all_items: bool = False,
) -> None:
    """Compare the items behind cached training rows with the dataset: `all_items`, or where some were cached under a text of the definition
    that is not trusted yet; else ITEMS of them, evenly spread. Each item is read once, over all checkpoints (place -> what it holds).

    Raises CacheError naming the first that differs.
    """
    units = [unit for held in everything.values() for unit in held.units]
    if not units:
        return
    length = len(run.examples(split))
    changed = any(
        {u.definition for u in held.units} - trusted(place, run.definition.digest)
        for place, held in everything.items()
    )
    stop = min(length, max(unit.stop for unit in units))
    chosen = (
        np.arange(stop)
        if all_items or changed or stop <= ITEMS
        else np.unique(np.linspace(0, stop - 1, ITEMS).astype(int))
    )
    with reporter.progress(f"comparing {split} examples", len(chosen)) as advance:
        for first in range(0, len(chosen), ITEMS):
            ids = chosen[first : first + ITEMS]
            now: torch.Tensor | None = None
            for unit in units:
                at = unit.position(ids)
                if (at >= 0).any():
                    now = run.examples(split).digests(ids) if now is None else now
                    here = ids[at >= 0]
                    compare_data(
                        UnitIndex([unit]).read(unit.columns[:1], "norms", here),
                        now[torch.from_numpy(at >= 0)],
                        split,
                        store.folder,
                    )
            advance(len(ids))


def sampled(units: Sequence[Unit], most: int, length: int) -> Iterator[tuple[Unit, np.ndarray]]:
    """About `most` examples below `length`, spread evenly over the units and within them."""
    chosen = [
        units[i]
        for i in np.unique(np.linspace(0, len(units) - 1, min(most, len(units))).astype(int))
    ]
    for unit in chosen:
        ids = unit.held_ids[unit.held_ids < length]
        if len(ids):
            yield (
                unit,
                ids[
                    np.unique(
                        np.linspace(
                            0, len(ids) - 1, min(math.ceil(most / len(chosen)), len(ids))
                        ).astype(int)
                    )
                ],
            )
