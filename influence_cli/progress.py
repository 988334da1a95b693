"""How long work speaks to whoever waits for it. The base class is silent; the command line has one that writes to stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[
    ..., None
]  # advance(examples, where=""): so many more done, and where the work stands


class Reporter:
    """Notes (things a user should know) and progress (how far the work is)."""

    def note(self, message: str) -> None:
        """Say one thing, once."""

    @contextmanager
    def progress(self, doing: str, total: int) -> Iterator[Advance]:
        """A stretch of work over `total` (checkpoint, example) pairs; yields the function that advances it."""

        def silent(examples: int, where: str = "") -> None:
            pass

        yield silent
