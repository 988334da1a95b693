"""The cache of one run: which folder holds a checkpoint's units, and which of them are still
valid.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import Settings, checkpoint_key
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import Unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.errors import CheckpointError
from influence_cli.extraction import revalidate
from influence_cli.progress import Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import Run

# (split, checkpoint, columns, ids) -> the rows, computed again and rounded as stored
Recompute = Callable[[str, Checkpoint, Sequence[str], np.ndarray], GradientRows]


class CachedRows:
    """The units of a run in an opened store."""

    def __init__(self, run: Run, settings: Settings, store: Store, reporter: Reporter) -> None:
        self.run, self.settings, self.store, self.reporter = run, settings, store, reporter
        self._indexes: dict[Path, UnitIndex] = {}
        self._checked: set[tuple[str, int]] = set()
        self._query_digests: dict[int, int] = {}
        self._keys: dict[Checkpoint, str] = {}  # one identity per checkpoint and command

    @property
    def settings_folder(self) -> Path:
        return self.store.folder / self.settings.key

    def folder(self, split: str, checkpoint: Checkpoint) -> Path:
        """The folder of a checkpoint's units. Users edit queries often and they are cheap: each
        text of the definition has its own folder of query units, and of rows from the command line.
        """
        if checkpoint not in self._keys:
            always = self.store.verification.always
            self._keys[checkpoint] = self._digest_checkpoint(checkpoint, compare=always)
        key = self.run.examples(split).key
        folder = self.settings_folder / self._keys[checkpoint] / key
        return folder if key == "train" else folder / self.run.definition.digest[:12]

    def check_unchanged(self, checkpoint: Checkpoint) -> None:
        """Raises where gradients that were just computed may be of another checkpoint or definition
        than the one whose digest their unit would have."""
        self.run.definition.check_unchanged()
        if self._digest_checkpoint(checkpoint) != self._keys[checkpoint]:
            raise CheckpointError(
                f"{checkpoint.name} was replaced while the command ran",
                "finished units are kept; run the same command again",
            )

    def _digest_checkpoint(self, checkpoint: Checkpoint, compare: bool = False) -> str:
        return checkpoint_key(checkpoint, self.store.folder / "checkpoints.json", compare)

    def index(self, split: str, checkpoint: Checkpoint) -> UnitIndex:
        """The units of a checkpoint; of queries only those whose item is unchanged."""
        folder = self.folder(split, checkpoint)
        if folder not in self._indexes:
            index = self.store.index_units(folder)
            if split == "query":
                index = UnitIndex(
                    [unit.keep_examples(self._unchanged(unit)) for unit in index.units],
                    self.store.verification,
                )
            self._indexes[folder] = index
        return self._indexes[folder]

    def forget_indexes(self) -> None:
        """Read the folders again at the next use: this process or another one wrote units."""
        self._indexes.clear()

    def unit_digest(self, split: str, ids: np.ndarray) -> str:
        """What a new unit depends on: the definition; for queries also the items themselves."""
        if split == "train":
            return self.run.definition.digest
        items = self._query_digests_of(ids)
        return hashlib.sha256(self.run.definition.digest.encode() + items.tobytes()).hexdigest()

    def check_training_rows(self, checkpoints: Sequence[Checkpoint], recompute: Recompute) -> None:
        """Compare cached training rows with the run, once per checkpoint. Raises CacheError where
        they differ."""
        new = [point for point in checkpoints if ("train", point.step) not in self._checked]
        if not new:
            return
        indexes = {self.folder("train", point): self.index("train", point) for point in new}
        revalidate.check_items(self.run, "train", indexes, self.store, self.reporter)
        compared = 0
        for checkpoint, (folder, index) in zip(new, indexes.items(), strict=True):
            compared += revalidate.check_gradients(
                self.run, checkpoint, folder, index, self.store, self.settings.rounding, recompute
            )
            self._checked.add(("train", checkpoint.step))
        if compared:
            self.reporter.note(
                "definition.py changed since the training gradients were cached; influence "
                f"computed {revalidate.GRADIENTS} of them again at each of {compared} "
                "checkpoints: they agree, so it uses the cache"
            )

    def _unchanged(self, unit: Unit) -> np.ndarray:
        """Mask over a unit's queries: the item is the one that was captured."""
        rows = UnitIndex([unit], self.store.verification).read_rows(
            unit.columns[:1], "norms", unit.example_ids
        )
        known = unit.example_ids < len(self.run.query)
        unchanged = np.zeros(len(known), dtype=bool)
        digests = self._query_digests_of(unit.example_ids[known])
        unchanged[known] = rows.digests.numpy()[known] == digests
        return unchanged

    def _query_digests_of(self, ids: np.ndarray) -> np.ndarray:
        """(Q,) int64. It reads each query once."""
        new = [index for index in ids.tolist() if index not in self._query_digests]
        if new:
            digests = self.run.query.digests(new).tolist()
            self._query_digests.update(zip(new, digests, strict=True))
        return np.array([self._query_digests[index] for index in ids.tolist()], dtype="<i8")
