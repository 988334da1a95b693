"""How long work speaks to whoever waits for it. The base class is silent; the command line has one
that writes to stderr.
"""

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
        """A stretch of work over `total` (checkpoint, example) pairs; yields the function that
        advances it.
        """

        def silent(examples: int, where: str = "") -> None:
            pass

        yield silent


def format_bytes(count: float) -> str:
    """`1.5 MB`, in powers of 1,000."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def format_duration(seconds: float) -> str:
    """`12.3 s`, `25 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
