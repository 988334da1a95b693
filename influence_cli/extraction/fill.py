"""Fills the cache: plans what a request lacks, computes it unit by unit, and writes it.

Ranks of a torchrun job share the units. Rank 0 plans for all of them.
"""

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.unit_file import Level, Unit
from influence_cli.errors import CacheError
from influence_cli.extraction.cached_rows import CachedRows, Recompute
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.extraction.machine import check_fits
from influence_cli.extraction.memory_budget import SizeRecord
from influence_cli.extraction.work_plan import CheckpointWork, WorkPlan, WorkUnit
from influence_cli.parallel.messages import Message
from influence_cli.parallel.ranks import Ranks
from influence_cli.progress import Advance, format_bytes
from influence_cli.run.checkpoints import Checkpoint

ANNOUNCED_BYTES = 1 << 30  # a note names the bytes of a larger addition to the cache
VISIBLE_WITHIN = 60  # seconds until a network file system shows what another machine wrote


@dataclass(frozen=True)
class FillRequest:
    """The rows that a method needs: these columns, of these examples at each checkpoint."""

    split: str
    ids_at: Sequence[tuple[Checkpoint, Ids]]
    columns: Sequence[str]
    level: Level = "values"


@dataclass(frozen=True)
class SharedPlan:
    """Rank 0's plan of a request, for all ranks. `disk_bytes`: what the new units take on disk."""

    request: FillRequest
    sizes: SizeRecord
    examples: int
    checkpoints: list[CheckpointWork]
    disk_bytes: int

    def to_message(self) -> Message:
        request = self.request
        return {
            "split": request.split,
            "ids_at": [(checkpoint.step, ids) for checkpoint, ids in request.ids_at],
            "columns": list(request.columns),
            "level": request.level,
            "sizes": {"forms": self.sizes.forms, "batches": self.sizes.batches},
            "examples": self.examples,
            "work": [
                (work.checkpoint.step, work.ids, work.starts, list(map(list, work.partial.items())))
                for work in self.checkpoints
            ],
            "disk_bytes": self.disk_bytes,
        }

    @classmethod
    def from_message(
        cls, message: Message, checkpoints: Sequence[Checkpoint], record: SizeRecord
    ) -> "SharedPlan":
        """Another rank's plan. `checkpoints`: all of the run. `record`: this rank's own."""
        at = {checkpoint.step: checkpoint for checkpoint in checkpoints}
        ids_at = [(at[step], ids) for step, ids in message["ids_at"]]
        request = FillRequest(message["split"], ids_at, message["columns"], message["level"])
        sizes = SizeRecord(
            record.path,
            {name: (kind, size) for name, (kind, size) in message["sizes"]["forms"].items()},
            {key: (count, size) for key, (count, size) in message["sizes"]["batches"].items()},
        )
        work = [
            CheckpointWork(
                at[step], ids, starts, {start: (names, of) for start, (names, of) in partial}
            )
            for step, ids, starts, partial in message["work"]
        ]
        return cls(request, sizes, message["examples"], work, message["disk_bytes"])


class CacheFiller:
    """Computes the rows that a cache lacks."""

    def __init__(self, rows: CachedRows, extractor: GradientExtractor, ranks: Ranks) -> None:
        self.rows, self.extractor, self.ranks = rows, extractor, ranks

    def fill(self, request: FillRequest, recompute: Recompute) -> int:
        """Compute and store what is lacking; returns the number of (checkpoint, example) pairs.

        Each rank returns once all rows of the request are on disk. Raises CacheError: a cache of
        another run, a full disk, too little memory.
        """
        if self.ranks.rank:
            plan = self._receive_plan()
            assert plan is not None
        else:
            plan = self._checked_plan(request, recompute)
            if self.ranks.count > 1:
                self.ranks.share(plan.to_message())
        self._work(plan)
        return plan.examples

    def plan(self, request: FillRequest) -> WorkPlan:
        """What the request lacks."""
        plan = self._empty_plan(request)
        for checkpoint, ids in request.ids_at:
            plan.add(checkpoint, ids, self.rows.index(request.split, checkpoint))
        return plan

    def serve(self) -> None:
        """Share the work of the requests that rank 0 fills, until it leaves `serving`."""
        while (plan := self._receive_plan()) is not None:
            self._work(plan)

    @contextmanager
    def serving(self) -> Iterator[None]:
        """For rank 0: the other ranks `serve` inside this block."""
        try:
            yield
        finally:
            self.ranks.share(None)

    def _receive_plan(self) -> SharedPlan | None:
        """Rank 0's next plan; None: rank 0 needs nothing more."""
        message = self.ranks.share(None)
        if message is None:
            return None
        run, record = self.extractor.run, self.extractor.budget.record(message["split"])
        return SharedPlan.from_message(message, run.checkpoints, record)

    def checked_bytes(self, request: FillRequest, recompute: Recompute) -> int:
        """The bytes on disk of what the request lacks. Raises as `fill` does, before any work."""
        return self._checked_plan(request, recompute).disk_bytes

    def _checked_plan(self, request: FillRequest, recompute: Recompute) -> SharedPlan:
        if request.split == "train":
            checkpoints = [checkpoint for checkpoint, _ in request.ids_at]
            self.rows.check_training_rows(checkpoints, recompute)
        plan, disk_bytes = self.plan(request), 0
        budget = self.extractor.budget
        if plan:
            disk_bytes, memory = budget.needs(
                request.split, request.columns, plan.examples, request.level
            )
            check_fits(self.rows.store.folder, disk_bytes, memory * self.ranks.place.beside)
            if disk_bytes >= ANNOUNCED_BYTES:
                self.extractor.reporter.note(
                    f"the gradients of {request.split} examples take {format_bytes(disk_bytes)} in "
                    f"{self.rows.store.folder}; --project K makes them smaller, --cache none "
                    "writes none"
                )
        record = budget.record(request.split)
        return SharedPlan(request, record, plan.examples, plan.checkpoints, disk_bytes)

    def _empty_plan(self, request: FillRequest) -> WorkPlan:
        split, level, rows = request.split, request.level, self.rows
        size = self.extractor.budget.unit_size(split, request.columns, level)
        split_size = len(self.extractor.run.examples(split))

        def unit_for(
            checkpoint: Checkpoint, columns: Sequence[str], start: int, ids: np.ndarray
        ) -> Unit:
            stop = min(int(ids[-1]) // size * size + size, split_size)
            folder, digest = rows.folder(split, checkpoint), rows.unit_digest(split, ids)
            return rows.store.unit_for(folder, columns, level, digest, start, stop, ids)

        return WorkPlan(request.columns, level, size, unit_for)

    def _work(self, shared: SharedPlan) -> None:
        request = shared.request
        self.extractor.budget.records[request.split] = shared.sizes
        if shared.examples:
            self._compute_units(shared)
            self.ranks.wait()
            self.rows.forget_indexes()
        if self.ranks.count > 1:
            self._wait_until_visible(request)

    def _compute_units(self, shared: SharedPlan) -> None:
        """Compute units of the plan; of several ranks each takes the next one that is free."""
        request, next_number = shared.request, 0
        plan = self._empty_plan(request)
        plan.checkpoints = shared.checkpoints
        names = {
            checkpoint.step: f"checkpoint {k} of {len(request.ids_at)}"
            for k, (checkpoint, _) in enumerate(request.ids_at, start=1)
        }
        store, dtype = self.rows.store, self.rows.settings.storage_dtype
        label = f"gradients of {request.split} examples"
        with (
            self.extractor.reporter.progress(label, shared.examples) as advance,
            store.writer(dtype, shared.disk_bytes) as writer,
        ):
            for number in self.ranks.deal(len(plan)):
                for skipped in range(next_number, number):  # other ranks work on these
                    advance(len(plan[skipped].ids), names[plan[skipped].checkpoint.step])
                work, next_number = plan[number], number + 1
                rows = self.compute(request, work, advance, names[work.checkpoint.step])
                if rows is not None:
                    writer.write(work.unit, rows)

    def compute(
        self,
        request: FillRequest,
        work: WorkUnit,
        advance: Advance = lambda examples, where="": None,
        where: str = "",
    ) -> GradientRows | None:
        """The rows of a unit; None where another process wrote it first."""
        unit = work.unit
        if unit.path.is_file():
            self.rows.store.list_columns(unit)
            advance(len(work.ids), where)
            return None
        rows = self.extractor.rows_at(
            work.checkpoint, request.split, unit.columns, work.ids, unit.level, advance, where
        )
        self.rows.check_unchanged(work.checkpoint)
        return rows

    def _wait_until_visible(self, request: FillRequest) -> None:
        """Wait until this machine sees what all ranks wrote. Raises CacheError after
        VISIBLE_WITHIN.
        """
        deadline = time.monotonic() + VISIBLE_WITHIN
        while lacking := self.plan(request):
            if time.monotonic() > deadline:
                raise CacheError(
                    f"{socket.gethostname()} (rank {self.ranks.rank}) does not see "
                    f"{len(lacking)} units that other ranks wrote {VISIBLE_WITHIN} s ago",
                    f"the first: {lacking[0].unit.path}",
                    "--cache names a folder that all machines share; "
                    "run the same command to resume",
                )
            time.sleep(0.5)
            self.rows.forget_indexes()
