"""The ranks of a torchrun job: processes that share the work of one command.

Importing this module imports nothing heavy.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

# None, bool, int, float, str, range, array, or a list, tuple or dict of messages
Message = Any


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

    def share(self, message: Message) -> Message:
        """Returns the message of rank 0 at every rank."""
        return message

    def wait(self) -> None:
        """Waits until every rank calls it."""

    def deal(self, number: int) -> Iterator[int]:
        """Deal the numbers 0 to `number` - 1 to the ranks, each time the next one to the rank that
        asks. Yields this rank's numbers, which rise.
        """
        yield from range(number)

    def gather(self, message: Message) -> list[Message]:
        """At rank 0 the messages of all ranks, in their order; elsewhere an empty list."""
        return [message]

    def collect(self, parts: Iterable[Message]) -> Iterator[Message]:
        """At rank 0 yields the messages of all other ranks, one at a time. Elsewhere sends them
        and yields nothing.
        """
        return iter(())

    def close(self) -> None:
        """Leave the job."""


def open_ranks(place: Place) -> Ranks:
    """The connected ranks of this job. A single process needs no torch."""
    if place.count == 1:
        return Ranks(place)
    from influence_cli.parallel.torch_ranks import TorchRanks

    return TorchRanks(place)
