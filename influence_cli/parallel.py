"""Which part of the work a process does: its shard of the training examples, or its rank's share.

Importing this module imports nothing heavy.
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
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from influence_cli.errors import RankLost, UsageProblem

if TYPE_CHECKING:
    import numpy as np

    Ids = range | np.ndarray  # rising example ids

T = TypeVar("T")
# Shards begin at multiples of these. Units of the cache begin at powers of two, COARSE at most.
COARSE, FINE = 4096, 64
EXPECTED = (
    "expected: i/n (shard i of n, counted from 1), or auto or auto/n in a job array of Slurm or "
    "Kubernetes"
)


# ---------------------------------------------------------------- shards
@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def of(self, ids: "Ids") -> "Ids":
        """Those of the rising ids that are this shard's: a stretch, maybe empty. All shards
        together have each id once.

        Cut where units and batches begin (multiples of 4096), so that a shard gives the bits of the
        whole; where that would be uneven, at a smaller power of two, at least 64.
        """
        size = COARSE
        while size > FINE and len(ids) < 4 * self.count * size:
            size //= 2
        first, last = (
            _cut(ids, number * len(ids) // self.count, size)
            for number in (self.index - 1, self.index)
        )
        return ids[first:last]


def _cut(ids: "Ids", position: int, size: int) -> int:
    """The position nearest to this one at which a multiple of `size` lies between two ids; both
    ends are cuts.
    """
    if position in (0, len(ids)):
        return position
    line = int(ids[position]) // size * size
    below, above = bisect_left(ids, line), bisect_left(ids, line + size)
    return below if position - below <= above - position else above


def parse_shard(spec: str, environ: Mapping[str, str]) -> Shard:
    """`--shard i/n`, `auto`, or `auto/n`. Raises UsageProblem: not that, or no job array to be
    found.
    """
    match = re.fullmatch(r"(\d+|auto)(?:/(\d+))?", spec)
    if not match or (match[1] != "auto" and match[2] is None):
        raise UsageProblem(f"--shard {spec}", EXPECTED)
    count = int(match[2]) if match[2] else None
    if count == 0:
        raise UsageProblem(f"--shard {spec}: no shards", EXPECTED)
    if match[1] != "auto":
        assert count is not None
        if not 1 <= int(match[1]) <= count:
            raise UsageProblem(
                f"--shard {spec}: no such shard", f"expected: 1/{count} to {count}/{count}"
            )
        return Shard(int(match[1]), count)
    return _of_array(spec, count, environ)


def _of_array(spec: str, count: int | None, environ: Mapping[str, str]) -> Shard:
    """The place in a job array of Slurm or Kubernetes.

    With `count` the array's places are 1 to n (Kubernetes: 0 to n - 1), so that a single job of it
    can be re-run.
    """
    if environ.get("SLURM_ARRAY_TASK_ID"):
        name, lowest = "SLURM_ARRAY_TASK_ID", 1
    elif environ.get("JOB_COMPLETION_INDEX"):
        name, lowest = "JOB_COMPLETION_INDEX", 0
    else:
        raise UsageProblem(
            f"--shard {spec}: this process is not part of a Slurm or Kubernetes job array",
            "expected: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX in the environment",
            "name the shard: --shard $INDEX/$COUNT, counted from 1",
        )
    place = _number(spec, name, environ)
    if count is None:
        return _slurm_shard(spec, place, environ) if lowest else _count_unknown(spec, place)
    if not lowest <= place < lowest + count:
        raise UsageProblem(
            f"--shard {spec}: {name} is {place}",
            f"expected: {lowest} to {lowest + count - 1} for an array of {count} jobs",
        )
    return Shard(place - lowest + 1, count)


def _number(spec: str, name: str, environ: Mapping[str, str], default: int | None = None) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UsageProblem(
            f"--shard {spec}: {name} is {text!r}",
            "expected: a number",
            "name the shard: --shard $INDEX/$COUNT",
        )
    return int(text)


def _count_unknown(spec: str, place: int) -> NoReturn:
    raise UsageProblem(
        f"--shard {spec}: JOB_COMPLETION_INDEX is {place}, and Kubernetes does not give the number "
        "of jobs",
        "give the number: --shard auto/n, for an array from 0 to n - 1",
    )


def _slurm_shard(spec: str, place: int, environ: Mapping[str, str]) -> Shard:
    """Slurm sets the first place, the last one, their step and (from version 19) the number of
    jobs.
    """
    first, last = (_number(spec, f"SLURM_ARRAY_TASK_{name}", environ) for name in ("MIN", "MAX"))
    step = _number(spec, "SLURM_ARRAY_TASK_STEP", environ, default=1)
    total = (last - first) // step + 1
    count = _number(spec, "SLURM_ARRAY_TASK_COUNT", environ, default=total)
    if first > 1 or not first <= place <= last or (place - first) % step or count != total:
        raise UsageProblem(
            f"--shard {spec}: the Slurm array has gaps, or does not start at 0 or 1",
            f"found: place {place} in {first} to {last}, step {step}, {count} jobs",
            "give the number of shards to re-run some jobs of an array 1-n: --shard auto/n; or "
            "name the shard: --shard $INDEX/$COUNT",
        )
    return Shard((place - first) // step + 1, total)


# ---------------------------------------------------------------- ranks
@dataclass(frozen=True)
class Place:
    """Which of torchrun's processes this is: `rank` of `count`, and `local` of the `beside` ones on
    this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1


def place_of(environ: Mapping[str, str]) -> Place:
    """From what torchrun sets; a process without it is alone."""
    places = [
        environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    ]
    if not all(text.isdecimal() for text in places) or int(places[1]) == 1:
        return Place()
    return Place(*map(int, places))


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
        """Of 0, 1, ... `number` - 1 the ones that this rank gets: the next one each time it asks,
        until all are taken. Rising.
        """
        yield from range(number)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks, at rank 0; elsewhere nothing."""
        return [value]

    def collect(self, parts: Iterable[T]) -> Iterator[T]:
        """At rank 0 the parts of all others, one at a time; elsewhere nothing, once the own ones
        are sent.
        """
        return iter(())

    def close(self) -> None:
        """The job is done."""


class TorchRanks(Ranks):
    """torchrun's: numbers, short messages and waiting go through its store, what is gathered
    through gloo. Nothing that lies on a GPU is sent, so that this serves on any device. Messages
    are pickled, as torch's own are: between the ranks of one job, never from a file.
    """

    EVER = datetime.timedelta(days=30)  # ranks wait for the slowest one's work
    POLL = 0.02  # seconds

    def __init__(self, place: Place) -> None:
        """Raises UsageProblem: this torch can't, the ranks are not told where they meet, or
        torchrun started them again, in which case the store holds what the first ones said.
        """
        super().__init__(place)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            raise UsageProblem(
                "torchrun started the ranks again",
                "leave out --max-restarts; the same command goes on from here",
            )
        import torch.distributed as dist

        if not dist.is_available():
            raise UsageProblem(
                f"{place.count} ranks, but this torch was built without torch.distributed",
                "--shard does without",
            )
        self._dist, self._turns = dist, 0
        try:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=self.EVER))
        except ValueError as error:
            raise UsageProblem(
                f"RANK and WORLD_SIZE are set, but the ranks can't meet: {error}",
                "start them by torchrun",
            ) from error
        with self._lost():
            store = dist.PrefixStore("gloo", self._store)
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.count, timeout=self.EVER
            )

    @contextmanager
    def _lost(self) -> Iterator[None]:
        """torch says that another rank is gone by a RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                "another rank is gone", "what was written stays: run the same command again"
            ) from error

    def _turn(self) -> str:
        """A name for this call, the same at every rank."""
        self._turns += 1
        return f"influence-{self._turns}"

    def _until(self, key: str) -> None:
        """Until some rank has set this key. Not by the store's own wait, in which signals are not
        heard.
        """
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
                own_number = self._store.add(key, 1) - 1
            if own_number >= number:
                return
            yield own_number

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        with self._lost():
            self._dist.gather_object(value, values if self.rank == 0 else None)
        return values if self.rank == 0 else []

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
            while (
                self.rank == 0
                and self._store.add("influence-gone", 0) < self.count
                and time.monotonic() < until
            ):
                time.sleep(self.POLL)
            self._dist.destroy_process_group()


def open_ranks(place: Place) -> Ranks:
    """The ranks of this job, met; one that is alone needs no torch."""
    return TorchRanks(place) if place.count > 1 else Ranks(place)
