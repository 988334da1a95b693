"""What methods ask: the rows of these columns for these examples, cached or computed."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.cache.identity import Settings
from influence_cli.cache.quantize import as_stored
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import Level
from influence_cli.extraction.batches import Batches
from influence_cli.extraction.cached_rows import CachedRows
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.extraction.fill import CacheFiller, FillRequest
from influence_cli.extraction.read_through import Block, read_blocks, read_or_compute
from influence_cli.extraction.row_counts import RowCounts
from influence_cli.gradients.forms import Form
from influence_cli.parallel.ranks import Ranks
from influence_cli.progress import Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import Run
from influence_cli.storage.atomic import remove_stale_files

IdsAt = tuple[Checkpoint, Ids]  # a checkpoint, and the examples whose rows are wanted there


class GradientSource:
    """Per-example gradients of a run. With a cache it computes each row once; without one each
    time.
    """

    def __init__(
        self,
        run: Run,
        settings: Settings,
        store: Store | None,
        device: torch.device,
        batch_size: int | None = None,
        cast: torch.dtype | None = None,
        reporter: Reporter | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """`store`: an opened cache, None for none. `batch_size`: None measures one. `cast`: dtype
        of floating batch tensors, None leaves them. `ranks`: processes that share the work.
        """
        self.run, self.settings, self.device = run, settings, device
        self.reporter, self.ranks = reporter or Reporter(), ranks or Ranks()
        self.cache = CachedRows(run, settings, store, self.reporter) if store else None
        folder = self.cache.settings_folder if self.cache else None
        self.extractor = GradientExtractor(
            run, settings, device, cast, self.reporter, batch_size, folder
        )
        self.budget = self.extractor.budget
        self.counts = RowCounts()  # of the rows that were read
        self.filler = CacheFiller(self.cache, self.extractor, self.ranks) if self.cache else None

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the whole cache; None for --cache none."""
        return self.cache.store.folder if self.cache else None

    # ------------------------------------------------------------ filling the cache
    def ensure(
        self,
        split: str,
        checkpoints: Sequence[Checkpoint],
        columns: Sequence[str],
        ids: Ids,
        level: Level = "values",
    ) -> int:
        """Compute and store the rows that the cache lacks; returns the number of (checkpoint,
        example) pairs. Without a cache: nothing. See CacheFiller.fill for errors.
        """
        return self.ensure_each(split, [(point, ids) for point in checkpoints], columns, level)

    def ensure_each(
        self, split: str, ids_at: Sequence[IdsAt], columns: Sequence[str], level: Level = "values"
    ) -> int:
        """The same, where the examples differ between checkpoints."""
        if self.filler is None:
            return 0
        return self.filler.fill(FillRequest(split, ids_at, columns, level), self.recompute)

    def count_uncached(
        self, split: str, ids_at: Sequence[IdsAt], columns: Sequence[str], level: Level = "values"
    ) -> int:
        """How many (checkpoint, example) pairs are not in the cache."""
        if self.filler is None:
            return sum(len(ids) for _, ids in ids_at)
        return self.filler.plan(FillRequest(split, ids_at, columns, level)).examples

    def serve(self) -> None:
        """Other ranks: share the capturing that rank 0 asks for, until it leaves `serving`."""
        if self.filler is not None:
            self.filler.serve()

    def serving(self) -> AbstractContextManager[None]:
        """Rank 0: the other ranks `serve` inside this block."""
        return self.filler.serving() if self.filler is not None else nullcontext()

    # ------------------------------------------------------------ reading
    def read(
        self,
        split: str,
        checkpoint: Checkpoint,
        columns: Sequence[str],
        ids: Ids,
        level: Level = "values",
    ) -> Iterator[GradientRows]:
        """The rows of these examples, unit by unit, in the order of their ids; float32 or
        float64.
        """
        return self.read_each(split, [(checkpoint, ids)], columns, level)

    def read_each(
        self, split: str, ids_at: Iterable[IdsAt], columns: Sequence[str], level: Level = "values"
    ) -> Iterator[GradientRows]:
        """The same for several checkpoints, one after the other. It prefetches the next unit."""
        blocks = self._blocks(split, ids_at, columns, level)
        if self.cache is None:
            yield from self._counted(split, columns, self._captured(split, blocks, columns, level))
        else:
            rows = read_blocks(self.cache, split, blocks, columns, level)
            yield from self._counted(split, columns, rows)

    def prepare(
        self, split: str, checkpoints: Sequence[Checkpoint], columns: Sequence[str], ids: Ids
    ) -> Callable[[Iterable[IdsAt]], Iterator[GradientRows]]:
        """Check a request, and return the function that reads its rows, all or some of them.

        A single process computes and stores on the way what the cache lacks: one pass over the
        data. Read to the end; that waits for the disk. Ranks compute all of it here, together.
        """
        if self.filler is None or self.ranks.count > 1:
            self.ensure(split, checkpoints, columns, ids)
            return lambda ids_at: self.read_each(split, ids_at, columns)
        filler = self.filler
        request = FillRequest(split, [(point, ids) for point in checkpoints], columns)
        disk_bytes = filler.checked_bytes(request, self.recompute)

        def read(ids_at: Iterable[IdsAt]) -> Iterator[GradientRows]:
            blocks = self._blocks(split, ids_at, columns, "values")
            rows = read_or_compute(filler, split, blocks, columns, disk_bytes)
            return self._counted(split, columns, rows)

        return read

    def _counted(
        self,
        split: str,
        columns: Sequence[str],
        blocks: Iterable[tuple[Checkpoint, GradientRows]],
    ) -> Iterator[GradientRows]:
        for checkpoint, rows in blocks:
            self.counts.add(split, checkpoint.step, columns, rows)
            yield rows

    def _blocks(
        self, split: str, ids_at: Iterable[IdsAt], columns: Sequence[str], level: Level
    ) -> Iterator[Block]:
        size = self.budget.unit_size(split, columns, level)
        for checkpoint, ids in ids_at:
            for block in cut_ids(ids, size):
                yield checkpoint, block

    def _captured(
        self, split: str, blocks: Iterable[Block], columns: Sequence[str], level: Level
    ) -> Iterator[tuple[Checkpoint, GradientRows]]:
        for checkpoint, block in blocks:
            rows = self.extractor.rows_at(checkpoint, split, columns, block, level)
            yield checkpoint, dataclasses.replace(rows, forms=self._widened(rows))

    def _widened(self, rows: GradientRows) -> dict[str, Form]:
        """Forms on the CPU, half precision as float32, as a cache would give them."""
        if self.settings.precision not in (torch.float16, torch.bfloat16):
            return rows.forms
        cpu = torch.device("cpu")
        return {name: form.to(cpu, torch.float32) for name, form in rows.forms.items()}

    # ------------------------------------------------------------ computing
    def recompute(
        self, split: str, checkpoint: Checkpoint, columns: Sequence[str], ids: np.ndarray
    ) -> GradientRows:
        """Rows computed now and rounded as stored, to compare with cached ones."""
        rows = self.extractor.rows_at(checkpoint, split, columns, ids)
        storage_dtype = self.settings.storage_dtype
        forms = {name: as_stored(form, storage_dtype) for name, form in rows.forms.items()}
        return dataclasses.replace(rows, forms=forms)

    def exact(self) -> "GradientSource":
        """The same gradients before projection and storage, of the same model, without a cache."""
        settings = dataclasses.replace(
            self.settings, projection=None, storage_dtype=self.settings.precision
        )
        batch_size, cast = self.budget.requested_batch_size, self.extractor.batches.cast
        return GradientSource(
            self.run, settings, None, self.device, batch_size, cast, self.reporter
        )

    def with_batches(self, batches: Batches) -> "GradientSource":
        """Gradients of other batches of the run's examples, without a cache: they are not those of
        the examples.
        """
        other = copy.copy(self)
        other.cache, other.filler, other.counts = None, None, RowCounts()
        other.extractor = self.extractor.with_batches(batches)
        return other


def open_store(folder: Path, verify: bool = False) -> Store:
    """The cache folder, without the temporary files that killed processes left. `verify`: compare
    all that is read with its checksums."""
    store = Store(folder, verify)
    remove_stale_files(folder)
    return store
