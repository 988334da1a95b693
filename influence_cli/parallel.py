"""Which part of the work is mine: `--shard i/n`, a stretch of the training examples; torchrun's ranks, which share one job.

Importing it imports nothing heavy: the command line asks for its place before any work.
"""

import datetime
import os
import pickle
import re
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from influence_cli.errors import RankLost, UsageProblem

if TYPE_CHECKING:
    import numpy as np

    Ids = range | np.ndarray  # rising example ids

T = TypeVar("T")
COARSE, FINE = 4096, 64  # shards are cut at multiples of these: units of the cache begin at powers of two, COARSE is their most
EXPECTED = "expected: i/n (shard i of n, i from 1), auto, or auto/n in a job array that does not say how many there are"


# ---------------------------------------------------------------- shards
@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def of(self, ids: "Ids") -> "Ids":
        """Those of the rising ids that are this shard's: a stretch, maybe empty. All shards together have each id once.

        Cut where units and batches begin (multiples of 4096), so that a shard gives the bits of the whole; where that would be uneven,
        at a smaller power of two, at least 64.
        """
        size = COARSE
        while size > FINE and len(ids) < 4 * self.count * size:
            size //= 2
        first, last = (_cut(ids, number * len(ids) // self.count, size) for number in (self.index - 1, self.index))
        return ids[first:last]


def _cut(ids: "Ids", position: int, size: int) -> int:
    """The position nearest to this one at which a multiple of `size` lies between two ids; both ends are cuts."""
    if position in (0, len(ids)):
        return position
    line = int(ids[position]) // size * size
    below, above = bisect_left(ids, line), bisect_left(ids, line + size)
    return below if position - below <= above - position else above


def parse_shard(spec: str, environ: Mapping[str, str]) -> Shard:
    """`--shard i/n`, `auto`, or `auto/n`. Raises UsageProblem: not that, or no job array to be found."""
    match = re.fullmatch(r"(\d+|auto)(?:/(\d+))?", spec)
    if not match or (match[1] != "auto" and match[2] is None):
        raise UsageProblem(f"--shard {spec}", EXPECTED)
    count = int(match[2]) if match[2] else None
    if count == 0:
        raise UsageProblem(f"--shard {spec}: no shards", EXPECTED)
    if match[1] != "auto":
        assert count is not None
        if not 1 <= int(match[1]) <= count:
            raise UsageProblem(f"--shard {spec}: no such shard", f"expected: 1/{count} to {count}/{count}")
        return Shard(int(match[1]), count)
    return _of_array(spec, count, environ)


@dataclass(frozen=True)
class Array:
    """How a scheduler tells a job its place in an array. Slurm and SGE say where the array begins and ends and its step, LSF all but the
    beginning, PBS and Kubernetes only the place."""

    name: str
    place: str
    first: str | int
    last: str | None = None
    step: str | None = None
    count: str | None = None
    unset: str = ""  # what `place` is outside of an array


ARRAYS = (
    Array(
        "Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"
    ),
    Array("LSF", "LSB_JOBINDEX", 1, "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP", unset="0"),
    Array("SGE", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE", unset="undefined"),
    Array("PBS", "PBS_ARRAY_INDEX", 1),
    Array("PBS", "PBS_ARRAYID", 1),
    Array("Kubernetes", "JOB_COMPLETION_INDEX", 0),
)


def _of_array(spec: str, count: int | None, environ: Mapping[str, str]) -> Shard:
    """The place in a job array. With `count` the array is 1 to n (Kubernetes: 0 to n - 1), so that one job of it can be run again alone."""
    array = next((array for array in ARRAYS if environ.get(array.place, "") not in ("", array.unset)), None)
    if array is None:
        looked = ", ".join(array.place for array in ARRAYS)
        raise UsageProblem(f"--shard {spec}: this is no job of an array", f"looked for: {looked}", "--shard i/n says it outright")

    def number(name: str | int | None) -> int | None:
        if not isinstance(name, str):
            return name
        text = environ.get(name, "")
        if text and not text.isdecimal():
            raise UsageProblem(f"--shard {spec}: {name} is {text!r}", "expected: a number", "--shard i/n says it outright")
        return int(text) if text else None

    place, first, last, step = number(array.place), number(array.first), number(array.last), number(array.step) or 1
    assert place is not None
    found = f"--shard {spec}: {array.place} is {place}"
    if count is not None:
        lowest = 0 if array.name == "Kubernetes" else 1
        if not lowest <= place < lowest + count:
            raise UsageProblem(found, f"expected: {lowest} to {lowest + count - 1}, the places of {count} jobs of {array.name}")
        return Shard(place - lowest + 1, count)
    if first is None or last is None:
        raise UsageProblem(
            f"{found}, and {array.name} does not say of how many",
            f"--shard auto/n says it, where the array is {'0 to n - 1' if array.name == 'Kubernetes' else '1 to n'}",
        )
    total = (last - first) // step + 1
    told = number(array.count) or total
    if first > 1 or not first <= place <= last or (place - first) % step or told != total:
        raise UsageProblem(
            f"{found}, in an array with gaps, or one that begins elsewhere than at 0 or 1 ({first} to {last} by {step}, {told} jobs)",
            "--shard auto/n, where the array is 1 to n, lets some of its jobs be run again; --shard i/n says it outright",
        )
    return Shard((place - first) // step + 1, total)


# ---------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Place:
    """Which of torchrun's processes this is: `rank` of `count`, and `local` of the `beside` ones on this machine."""

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1


def place_of(environ: Mapping[str, str]) -> Place:
    """From what torchrun sets; a process without it is alone."""
    found = [environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if not all(text.isdecimal() for text in found) or int(found[1]) == 1:
        return Place()
    return Place(*map(int, found))


class Ranks:
    """The processes that share a job; here one, for which everything is its own and nothing waits.

    All of it is collective: every rank makes the same calls in the same order.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.rank, self.count = self.place.rank, self.place.count

    def share(self, value: T) -> T:
        """What rank 0 has, at every rank."""
        return value

    def wait(self) -> None:
        """Until every rank is here."""

    def deal(self, number: int) -> Iterator[int]:
        """Of 0, 1, ... `number` - 1 the ones that this rank gets: the next one each time it asks, until all are taken. Rising."""
        yield from range(number)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, at rank 0; elsewhere nothing."""
        return [value]

    def collect(self, parts: Iterable[T]) -> Iterator[T]:
        """At rank 0 the parts of all others, one at a time; elsewhere nothing, once the own ones are sent."""
        return iter(())

    def close(self) -> None:
        """The job is done."""


class TorchRanks(Ranks):
    """torchrun's: numbers, short messages and waiting go through its store, what is gathered through gloo. Nothing that lies on a GPU is
    sent, so that this serves on any device. Messages are pickled, as torch's own are: between the ranks of one job, never from a file."""

    EVER = datetime.timedelta(days=30)  # ranks wait for the slowest one's work
    POLL = 0.02  # seconds

    def __init__(self, place: Place) -> None:
        """Raises UsageProblem: this torch can't, the ranks are not told where they meet, or torchrun started them again, in which case the
        store holds what the first ones said."""
        super().__init__(place)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            raise UsageProblem("torchrun started the ranks again", "leave out --max-restarts; the same command goes on from here")
        import torch.distributed as dist

        if not dist.is_available():
            raise UsageProblem(f"{place.count} ranks, but this torch was built without torch.distributed", "--shard does without")
        self._dist, self._turns = dist, 0
        try:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=self.EVER))
        except ValueError as error:
            raise UsageProblem(f"RANK and WORLD_SIZE are set, but the ranks can't meet: {error}", "start them by torchrun") from error
        with self._lost():
            store = dist.PrefixStore("gloo", self._store)
            dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.count, timeout=self.EVER)

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """torch says that another rank is gone by a RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost("another rank is gone", "what was written stays: run the same command again") from error

    def _turn(self) -> str:
        """A name for this call, the same at every rank."""
        self._turns += 1
        return f"influence-{self._turns}"

    def _until(self, key: str) -> None:
        """Until some rank has set this key. Not by the store's own wait, in which signals are not heard."""
        with self._lost():
            while not self._store.check([key]):
                time.sleep(self.POLL)

    def share(self, value: T) -> T:
        key = self._turn()
        if self.rank == 0:
            with self._lost():
                self._store.set(key, pickle.dumps(value))
            return value
        self._until(key)
        with self._lost():
            shared: T = pickle.loads(self._store.get(key))
        return shared

    def wait(self) -> None:
        key = self._turn()
        with self._lost():
            if self._store.add(key, 1) == self.count:
                self._store.set(f"{key}-all", "")
        self._until(f"{key}-all")

    def deal(self, number: int) -> Iterator[int]:
        key = self._turn()
        while True:
            with self._lost():
                mine = self._store.add(key, 1) - 1
            if mine >= number:
                return
            yield mine

    def gather(self, value: T) -> list[T]:
        found: list[Any] = [None] * self.count
        with self._lost():
            self._dist.gather_object(value, found if self.rank == 0 else None)
        return found if self.rank == 0 else []

    def collect(self, parts: Iterable[T]) -> Iterator[T]:
        for source in range(1, self.count) if self.rank == 0 else ():
            while (box := self._received(source)) is not None:
                yield box[0]
        if self.rank:
            for part in parts:
                self._send([part])
            self._send(None)
        self.wait()

    def _send(self, box: list[Any] | None) -> None:
        with self._lost():
            self._dist.send_object_list([box], dst=0)

    def _received(self, source: int) -> list[Any] | None:
        box: list[Any] = [None]
        with self._lost():
            self._dist.recv_object_list(box, src=source)
        return box[0]

    def close(self) -> None:
        """Rank 0 is the last to go: it may hold the store."""
        with self._lost():
            self._store.add("influence-gone", 1)
            until = time.monotonic() + 60
            while self.rank == 0 and self._store.add("influence-gone", 0) < self.count and time.monotonic() < until:
                time.sleep(self.POLL)
            self._dist.destroy_process_group()


def open_ranks(place: Place) -> Ranks:
    """The ranks of this job, met; one that is alone needs no torch."""
    return TorchRanks(place) if place.count > 1 else Ranks(place)
