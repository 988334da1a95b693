"""The ranks of a torchrun job: processes that share the work of one command.

Importing this module imports nothing heavy.
"""

import datetime
import os
import pickle
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from influence_cli.errors import RankLost, UsageProblem

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which of torchrun's processes this is: `rank` of `count`, and `local` of the `beside`
    processes on this machine.
    """

    rank: int = 0
    count: int = 1
    local: int = 0
    beside: int = 1


def place_of(environ: Mapping[str, str]) -> Place:
    """The place that torchrun's environment variables give. Without them: a single process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    texts = [environ.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts) or int(texts[1]) == 1:
        return Place()
    return Place(*map(int, texts))


class Ranks:
    """The processes that share a job. This base class is a single process, which never waits.

    All methods are collective: every rank makes the same calls in the same order.
    """

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.rank, self.count = self.place.rank, self.place.count

    def share(self, value: T) -> T:
        """Returns the value of rank 0 at every rank."""
        return value

    def wait(self) -> None:
        """Waits until every rank calls it."""

    def deal(self, number: int) -> Iterator[int]:
        """Deal the numbers 0 to `number` - 1 to the ranks, each time the next one to the rank that
        asks. Yields this rank's numbers, which rise.
        """
        yield from range(number)

    def gather(self, value: T) -> list[T]:
        """At rank 0 the values of all ranks, in their order; elsewhere an empty list."""
        return [value]

    def collect(self, parts: Iterable[T]) -> Iterator[T]:
        """At rank 0 yields the parts of all other ranks, one at a time. Elsewhere sends the parts
        and yields nothing.
        """
        return iter(())

    def close(self) -> None:
        """Leave the job."""


class TorchRanks(Ranks):
    """The ranks that torchrun starts.

    Numbers, short messages and waiting use torchrun's store. Gathered values use gloo. No rank
    sends a GPU tensor, so this works on any device. Messages are pickled like torch's own: between
    the ranks of one job, never from a file.
    """

    TIMEOUT = datetime.timedelta(days=30)  # ranks wait for the work of the slowest one
    POLL = 0.02  # seconds
    CLOSE_SECONDS = 60  # how long rank 0 waits for the others at the end

    def __init__(self, place: Place) -> None:
        """Raises UsageProblem if torch lacks torch.distributed, if the ranks can't meet, or if
        torchrun restarted them: then its store holds messages of the first ranks.
        """
        super().__init__(place)
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
            raise UsageProblem(
                "torchrun restarted the ranks",
                "leave out --max-restarts and run the same command to resume",
            )
        import torch.distributed as dist

        if not dist.is_available():
            raise UsageProblem(
                f"{place.count} ranks, but this torch was built without torch.distributed",
                "run shards instead: --shard i/n",
            )
        self._dist, self._calls = dist, 0
        try:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=self.TIMEOUT))
        except ValueError as error:
            raise UsageProblem(
                f"RANK and WORLD_SIZE are set, but the ranks can't meet: {error}",
                "start the ranks with torchrun",
            ) from error
        with self._report_lost_rank():
            store = dist.PrefixStore("gloo", self._store)
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.count, timeout=self.TIMEOUT
            )

    @contextmanager
    def _report_lost_rank(self) -> Iterator[None]:
        """Turns torch's RuntimeError for a rank that exited into RankLost."""
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                "another rank exited",
                "finished work is kept; run the same command to resume",
            ) from error

    def _new_key(self) -> str:
        """A key for this call, the same at every rank."""
        self._calls += 1
        return f"influence-{self._calls}"

    def _wait_for(self, key: str) -> None:
        """Waits until a rank sets this key. The store's own wait would ignore signals."""
        with self._report_lost_rank():
            while not self._store.check([key]):
                time.sleep(self.POLL)

    def share(self, value: T) -> T:
        key = self._new_key()
        if self.rank == 0:
            with self._report_lost_rank():
                self._store.set(key, pickle.dumps(value))
            return value
        self._wait_for(key)
        with self._report_lost_rank():
            shared: T = pickle.loads(self._store.get(key))
        return shared

    def wait(self) -> None:
        key = self._new_key()
        with self._report_lost_rank():
            if self._store.add(key, 1) == self.count:
                self._store.set(f"{key}-all", "")
        self._wait_for(f"{key}-all")

    def deal(self, number: int) -> Iterator[int]:
        key = self._new_key()
        while True:
            with self._report_lost_rank():
                own_number = self._store.add(key, 1) - 1
            if own_number >= number:
                return
            yield own_number

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        with self._report_lost_rank():
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
        with self._report_lost_rank():
            self._dist.send_object_list([box], dst=0)

    def _received(self, source: int) -> list[Any] | None:
        box: list[Any] = [None]
        with self._report_lost_rank():
            self._dist.recv_object_list(box, src=source)
        return box[0]

    def close(self) -> None:
        """Rank 0 exits last, because it may hold the store."""
        with self._report_lost_rank():
            self._store.add("influence-gone", 1)
            end = time.monotonic() + self.CLOSE_SECONDS
            while (
                self.rank == 0
                and self._store.add("influence-gone", 0) < self.count
                and time.monotonic() < end
            ):
                time.sleep(self.POLL)
            self._dist.destroy_process_group()


def open_ranks(place: Place) -> Ranks:
    """The connected ranks of this job. A single process needs no torch."""
    return TorchRanks(place) if place.count > 1 else Ranks(place)
