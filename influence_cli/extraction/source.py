"""What is missing is captured and stored; what is there is read. The order of work, cut into units that follow from the request alone."""

import dataclasses
import hashlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.id_blocks import Ids, cut
from influence_cli.cache.identity import Settings, checkpoint_key
from influence_cli.cache.quantize import SCALED, as_stored
from influence_cli.cache.store import (
    UNIT_EXAMPLES,
    Fetched,
    GradientRows,
    Level,
    Store,
    Unit,
    UnitIndex,
)
from influence_cli.errors import CacheError, GradientError, is_out_of_memory
from influence_cli.extraction import revalidate
from influence_cli.extraction.extractor import GradientExtractor
from influence_cli.extraction.memory_budget import Sizes, batch_for, check_fits, key_of, weigh
from influence_cli.extraction.work_plan import Job, Missing, Stretch
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.parallel import Ranks
from influence_cli.progress import Advance, Reporter
from influence_cli.run import Checkpoint, Run
from influence_cli.run.datasets import digest
from influence_cli.storage.atomic import sweep

LATE = 60  # seconds in which a file that another machine wrote must be seen
Wanted = tuple[Checkpoint, Ids]


@dataclass(frozen=True)
class Order:
    """What `ensure` found missing, and how it is cut: settled by rank 0 for all. `stored`: bytes that it will take on disk."""

    split: str
    wanted: Sequence[Wanted]
    columns: Sequence[str]
    level: Level
    sizes: Sizes | None
    examples: int
    stretches: list[Stretch]
    stored: int


class GradientSource(GradientExtractor):
    """Per-example gradients of a run: from the cache where they are there, captured where not. Without a store: captured each time."""

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
        """`cast`: what floating batch tensors are cast to; None leaves them. `batch_size` None: by the model's size. `ranks`: the processes
        that share the work, each with a GradientSource of its own; none: this one is alone."""
        super().__init__(run, settings, device, cast, reporter or Reporter())
        self.store, self.ranks, self.asked_batch_size = store, ranks or Ranks(), batch_size
        self._held: dict[Path, UnitIndex] = {}
        self._verified: set[tuple[str, int]] = set()
        self._digests: dict[int, int] = {}
        self._sizes: dict[str, Sizes] = {}

    # ------------------------------------------------------------ asking
    def ensure(
        self,
        split: str,
        checkpoints: Sequence[Checkpoint],
        columns: Sequence[str],
        ids: Ids,
        level: Level = "values",
    ) -> int:
        """Capture and store what is missing of these cells; returns how many (checkpoint, example) pairs that were. No store: nothing."""
        return self.ensure_each(
            split, [(checkpoint, ids) for checkpoint in checkpoints], columns, level
        )

    def ensure_each(
        self, split: str, wanted: Sequence[Wanted], columns: Sequence[str], level: Level = "values"
    ) -> int:
        """The same, of examples that differ from checkpoint to checkpoint. Ranks share the work; each returns once all of it is there."""
        if self.store is None:
            return 0
        order = self.ranks.share(
            self._order(split, wanted, columns, level) if self.ranks.rank == 0 else None
        )
        assert order is not None
        self._fill(order)
        return order.examples

    def _order(
        self, split: str, wanted: Sequence[Wanted], columns: Sequence[str], level: Level
    ) -> Order:
        assert self.store is not None
        jobs, stored = self.missing(split, wanted, columns, level, check=True), 0
        if jobs:
            stored, memory = self.needs(split, columns, jobs.examples, level)
            check_fits(self.store.folder, stored, memory * self.ranks.place.beside)
        return Order(
            split,
            wanted,
            columns,
            level,
            self._sizes.get(split),
            jobs.examples,
            jobs.stretches,
            stored,
        )

    def _fill(self, order: Order) -> None:
        """Do what is missing, of several ranks the next job that no other has taken."""
        assert self.store is not None
        if order.sizes is not None:
            self._sizes[order.split] = order.sizes
        if order.examples:
            jobs, seen = self._nothing(order.split, order.columns, order.level), 0
            jobs.stretches = order.stretches
            where = {
                checkpoint.step: f"checkpoint {k} of {len(order.wanted)}"
                for k, (checkpoint, _) in enumerate(order.wanted, start=1)
            }
            progress = self.reporter.progress(
                f"gradients of {order.split} examples", order.examples
            )
            with progress as advance, self.store.writer(self.settings.store, order.stored) as write:
                for number in self.ranks.deal(len(jobs)):
                    for taken in range(seen, number):  # by other ranks
                        advance(len(jobs[taken].ids), where[jobs[taken].checkpoint.step])
                    job, seen = jobs[number], number + 1
                    self._work(order.split, job, advance, where[job.checkpoint.step], write)
            self.ranks.wait()
            self._held.clear()
        if self.ranks.count > 1:
            self._arrive(order)

    def _arrive(self, order: Order) -> None:
        """Until this machine sees what all ranks wrote: on a network file system names may come late. Raises CacheError: too late."""
        until = time.monotonic() + LATE
        while lacking := self.missing(order.split, order.wanted, order.columns, order.level):
            if time.monotonic() > until:
                raise CacheError(
                    f"{socket.gethostname()} (rank {self.ranks.rank}) lacks {len(lacking)} units that other ranks wrote {LATE} s ago",
                    f"the first: {lacking[0].unit.path}",
                    "--cache names a folder that all machines share; the same command goes on from here",
                )
            time.sleep(0.5)
            self._held.clear()

    def help(self) -> None:
        """Share what rank 0 asks `ensure` for, until it is `helped`: of a job in which it does all else alone."""
        while (order := self.ranks.share(None)) is not None:
            self._fill(order)

    @contextmanager
    def helped(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.ranks.share(None)

    def missing(
        self,
        split: str,
        wanted: Sequence[Wanted],
        columns: Sequence[str],
        level: Level,
        check: bool = False,
    ) -> Missing:
        """The units of work that `ensure` would do, in order. `check`: first see that what is cached still holds.

        Raises CacheError where it does not.
        """
        assert self.store is not None
        if check:
            self._verify(split, [checkpoint for checkpoint, _ in wanted])
        jobs = self._nothing(split, columns, level)
        for checkpoint, ids in wanted:
            jobs.add(checkpoint, ids, self.held(split, checkpoint))
        return jobs

    def _nothing(self, split: str, columns: Sequence[str], level: Level) -> Missing:
        """A plan without work."""
        assert self.store is not None
        store, size, length = (
            self.store,
            self.unit_size(split, columns, level),
            len(self.run.examples(split)),
        )

        def unit(checkpoint: Checkpoint, names: Sequence[str], start: int, ids: np.ndarray) -> Unit:
            stop = min(int(ids[-1]) // size * size + size, length)
            return store.unit_for(
                self.place(split, checkpoint),
                names,
                level,
                self._definition(split, ids),
                start,
                stop,
                ids,
            )

        return Missing(columns, level, size, unit)

    def _verify(self, split: str, checkpoints: Sequence[Checkpoint]) -> None:
        """Once per checkpoint: compare what is cached of the training examples with the run as it is."""
        assert self.store is not None
        todo = [
            checkpoint
            for checkpoint in checkpoints
            if (split, checkpoint.step) not in self._verified
        ]
        if split != "train" or not todo:
            return
        everything = {
            self.place(split, checkpoint): self.held(split, checkpoint) for checkpoint in todo
        }
        revalidate.verify_items(self.run, split, everything, self.store, self.reporter)
        again = 0
        for checkpoint, (place, held) in zip(todo, everything.items(), strict=True):
            again += revalidate.verify(
                self.run,
                split,
                checkpoint,
                place,
                held,
                self.store,
                self.settings.rounding,
                self.again,
            )
            self._verified.add((split, checkpoint.step))
        if again:
            self.reporter.note(
                f"the definition changed since {split} gradients were cached: {revalidate.GRADIENTS} were taken again at each of {again} "
                "checkpoints and agree, so the cache is used"
            )

    def _definition(self, split: str, ids: np.ndarray) -> str:
        """What a new unit is captured under: the definition; of queries, which are edited often, also the items themselves."""
        if split == "train":
            return self.run.definition.digest
        items = np.array([self._query_digest(index) for index in ids], dtype="<i8")
        return hashlib.sha256(self.run.definition.digest.encode() + items.tobytes()).hexdigest()

    def lacking(
        self, split: str, checkpoints: Sequence[Checkpoint], columns: Sequence[str], ids: Ids
    ) -> int:
        """How many (checkpoint, example) pairs of gradients are not cached yet."""
        return self.lacking_each(split, [(checkpoint, ids) for checkpoint in checkpoints], columns)

    def lacking_each(self, split: str, wanted: Sequence[Wanted], columns: Sequence[str]) -> int:
        """The same, of examples that differ from checkpoint to checkpoint."""
        if self.store is None:
            return sum(len(ids) for _, ids in wanted)
        return self.missing(split, wanted, columns, "values").examples

    def read(
        self,
        split: str,
        checkpoint: Checkpoint,
        columns: Sequence[str],
        ids: Ids,
        level: Level = "values",
    ) -> Iterator[GradientRows]:
        """The rows of these examples, unit by unit, in the order of their ids; float32 or float64."""
        return self.read_each(split, [(checkpoint, ids)], columns, level)

    def read_each(
        self, split: str, wanted: Iterable[Wanted], columns: Sequence[str], level: Level = "values"
    ) -> Iterator[GradientRows]:
        """The same, one request after the other. While a unit is used the next is read from disk."""
        size = self.unit_size(split, columns, level)
        units = ((checkpoint, block) for checkpoint, ids in wanted for block in cut(ids, size))
        if self.store is None:
            for checkpoint, block in units:
                rows = self.capture(split, checkpoint, columns, block, level)
                narrow = self.settings.precision in (torch.float16, torch.bfloat16)
                forms = {
                    name: form.to(torch.device("cpu"), torch.float32) if narrow else form
                    for name, form in rows.forms.items()
                }
                yield GradientRows(rows.ids, rows.losses, rows.digests, rows.sqnorms, forms)
            return
        with ThreadPoolExecutor(1) as thread:
            coming: Future[Fetched] | None = None
            for checkpoint, block in units:
                following = thread.submit(self.held(split, checkpoint).fetch, columns, level, block)
                if coming is not None:
                    yield coming.result()()
                coming = following
            if coming is not None:
                yield coming.result()()

    # ------------------------------------------------------------ sizes
    def sizes(self, split: str, columns: Sequence[str], probe: bool = True) -> Sizes:
        """What these columns weigh; measured on two examples at the first checkpoint where it is not on record."""
        if split not in self._sizes:
            self._sizes[split] = Sizes.open(
                self.store.folder / self.settings.key if self.store else None, split
            )
        known = self._sizes[split]
        if probe and not (known.knows(columns) and key_of(columns) in known.batches):
            if self._loaded is None:
                self.load(self.run.checkpoints[0])
            capture = self.capture_of(split, columns)
            store = self.settings.store
            found = weigh(
                capture.sample,
                store.itemsize / self.settings.precision.itemsize,
                4 if store in SCALED else 0,
            )
            working = round(capture.activations) * 2 + sum(
                form.nbytes // len(form) for form in capture.sample.values()
            )
            known.add(columns, found, batch_for(working, self.device), working)
        return known

    def unit_size(self, split: str, columns: Sequence[str], level: Level) -> int:
        """Examples of a unit: a power of two, by the bytes of these columns."""
        if level == "norms":
            return UNIT_EXAMPLES // 4
        known = self.sizes(split, columns, probe=False)
        return (known if known.knows(columns) else self.sizes(split, columns)).unit(
            columns, UNIT_EXAMPLES
        )

    def needs(
        self, split: str, columns: Sequence[str], cells: int, level: Level = "values"
    ) -> tuple[int, int]:
        """Bytes on disk of so many (checkpoint, example) pairs, and of memory while they are taken: a batch at work, a unit that fills,
        a unit that is being written."""
        known = self.sizes(split, columns)
        each = 16 + 8 * len(columns) + (known.bytes_of(columns) if level == "values" else 0)
        host = (
            0
            if self.device.type == "cuda"
            else known.batches[key_of(columns)][1] * self.batch_size(split, columns)
        )
        units = (
            min(2 * self.unit_size(split, columns, level), len(self.run.examples(split)), cells)
            * each
            if level == "values"
            else 0
        )
        return cells * each, host + units

    def batch_size(self, split: str, columns: Sequence[str]) -> int:
        """Examples captured at once: as asked for, else as recorded."""
        return self.asked_batch_size or self.sizes(split, columns).batches[key_of(columns)][0]

    def ways(self, split: str, columns: Sequence[str]) -> dict[str, str]:
        """How the gradients of each column are taken: by a layer rule, by torch.func, or one example at a time."""
        if self._loaded is None:
            self.load(self.run.checkpoints[0])
        capture = self.capture_of(split, columns)
        if isinstance(capture, EmbeddingCapture):
            return dict.fromkeys(columns, "at the output" if capture.at_once else "one by one")
        if not capture.at_once:
            return dict.fromkeys(columns, "one by one")
        return {name: "rule" if name in capture.hooked else "torch.func" for name in columns}

    # ------------------------------------------------------------ places
    def place(self, split: str, checkpoint: Checkpoint) -> Path:
        """Queries are cheap and edited often: theirs are kept apart for each text of the definition."""
        assert self.store is not None
        key = checkpoint_key(checkpoint, self.store.folder / "checkpoints.json")
        place = self.store.folder / self.settings.key / key / split
        return place if split == "train" else place / self.run.definition.digest[:12]

    def held(self, split: str, checkpoint: Checkpoint) -> UnitIndex:
        """What is there; of queries the ones that are still the same items."""
        assert self.store is not None
        place = self.place(split, checkpoint)
        if place not in self._held:
            held = self.store.held(place)
            if split == "query":
                held = UnitIndex([unit.only(self._unchanged(unit)) for unit in held.units])
            self._held[place] = held
        return self._held[place]

    def _unchanged(self, unit: Unit) -> np.ndarray:
        """Mask over a unit's queries: whose item is the one that was captured."""
        known = UnitIndex([unit]).read(unit.columns[:1], "norms", unit.held_ids).digests.tolist()
        there = zip(unit.held_ids, known, strict=True)
        return np.array(
            [
                index < len(self.run.query) and self._query_digest(index) == value
                for index, value in there
            ],
            dtype=bool,
        )

    def _query_digest(self, index: int) -> int:
        if index not in self._digests:
            self._digests[index] = digest(self.run.query.item(index))
        return self._digests[index]

    def exact(self) -> "GradientSource":
        """The same gradients before projection and storage, of the same model: after theirs, say `moved`."""
        settings = dataclasses.replace(
            self.settings, projection=None, store=self.settings.precision
        )
        return GradientSource(
            self.run, settings, None, self.device, self.asked_batch_size, self.cast, self.reporter
        )

    def again(
        self, split: str, checkpoint: Checkpoint, columns: Sequence[str], ids: np.ndarray
    ) -> GradientRows:
        """Taken anew, to be compared with what is stored: rounded as that is."""
        rows = self.capture(split, checkpoint, columns, ids)
        return dataclasses.replace(
            rows,
            forms={name: as_stored(form, self.settings.store) for name, form in rows.forms.items()},
        )

    # ------------------------------------------------------------ working
    def _work(
        self,
        split: str,
        job: Job,
        advance: Advance,
        where: str,
        write: Callable[[Unit, GradientRows], None],
    ) -> None:
        if job.unit.path.is_file():  # another process was faster
            assert self.store is not None
            self.store.list_columns(job.unit)
            advance(len(job.ids), where)
            return
        write(
            job.unit,
            self.capture(
                split, job.checkpoint, job.unit.columns, job.ids, job.unit.level, advance, where
            ),
        )

    def capture(
        self,
        split: str,
        checkpoint: Checkpoint,
        columns: Sequence[str],
        ids: np.ndarray,
        level: Level = "values",
        advance: Advance = lambda examples, where="": None,
        where: str = "",
        here: bool = False,
    ) -> GradientRows:
        """Take the gradients of these examples now, batch by batch, into one buffer per column. `here`: with the parameters the model has.

        On a device that runs out of memory the batch is halved, recorded, and the examples are taken again."""
        if not here:
            self.load(checkpoint)
        while True:
            done = 0

            def count(examples: int) -> None:
                nonlocal done
                done += examples
                advance(examples, where)

            try:
                size = self.batch_size(split, columns)
                return self.take(
                    split, checkpoint, columns, ids, size, level, self.store is not None, count
                )
            except GradientError as error:
                if (
                    self.device.type == "cpu"
                    or self.asked_batch_size
                    or size == 1
                    or not is_out_of_memory(error.__cause__ or error)
                ):
                    raise
                known = self.sizes(split, columns)
                known.add(columns, {}, size // 2, known.batches[key_of(columns)][1])
                self.reporter.note(
                    f"out of memory on {self.device}: going on with batches of {size // 2}"
                )
                advance(-done, where)
                torch.cuda.empty_cache()


def open_store(folder: Path) -> Store:
    """The cache folder, rid of what killed processes left in it."""
    store = Store(folder)
    sweep(folder)
    return store
