"""The ranks that torchrun starts: they talk through torchrun's store and through gloo."""

import datetime
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from influence_cli.errors import RankLost, UsageProblem
from influence_cli.parallel.messages import Message, decode_message, encode_message
from influence_cli.parallel.ranks import Place, Ranks


class TorchRanks(Ranks):
    """The ranks that torchrun starts.

    Numbers, shared messages and waiting use torchrun's store; gathered messages use gloo. Messages
    are bytes (messages.py), so this works on any device, and no rank unpickles anything.
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
        if not dist.is_available():
            raise UsageProblem(
                f"{place.count} ranks, but this torch was built without torch.distributed",
                "run shards instead: --shard i/n",
            )
        self._calls = 0
        try:
            self._store, _, _ = next(dist.rendezvous("env://", timeout=self.TIMEOUT))
        except ValueError as error:
            raise UsageProblem(
                f"RANK and WORLD_SIZE are set, but the ranks can't meet: {error}",
                "start the ranks with torchrun",
            ) from error
        self._connect()

    def _connect(self) -> None:
        """Connect the ranks, in a thread: gloo waits for a rank that is gone, and ignores signals
        meanwhile.
        """
        errors: list[RuntimeError] = []

        def connect() -> None:
            store = dist.PrefixStore("gloo", self._store)
            try:
                dist.init_process_group(
                    "gloo", store=store, rank=self.rank, world_size=self.count, timeout=self.TIMEOUT
                )
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(self.POLL)
        with self._report_lost_rank():
            for error in errors:
                raise error

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

    def share(self, message: Message) -> Message:
        key = self._new_key()
        if self.rank == 0:
            with self._report_lost_rank():
                self._store.set(key, encode_message(message))
            return message
        self._wait_for(key)
        with self._report_lost_rank():
            content = self._store.get(key)
        return decode_message(content)

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

    def gather(self, message: Message) -> list[Message]:
        if self.rank:
            self._send(message)
            return []
        return [message, *(self._receive(source) for source in range(1, self.count))]

    def collect(self, parts: Iterable[Message]) -> Iterator[Message]:
        for source in range(1, self.count) if self.rank == 0 else ():
            while (box := self._receive(source)) is not None:
                yield box[0]
        if self.rank:
            for part in parts:
                self._send([part])
            self._send(None)
        self.wait()

    def _send(self, message: Message) -> None:
        """Send a message to rank 0: its length, and its bytes."""
        content = torch.frombuffer(bytearray(encode_message(message)), dtype=torch.uint8)
        with self._report_lost_rank():
            dist.send(torch.tensor([len(content)]), dst=0)
            dist.send(content, dst=0)

    def _receive(self, source: int) -> Message:
        size = torch.zeros(1, dtype=torch.int64)
        with self._report_lost_rank():
            dist.recv(size, src=source)
            content = torch.empty(int(size), dtype=torch.uint8)
            dist.recv(content, src=source)
        return decode_message(content.numpy().tobytes())

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
            dist.destroy_process_group()
