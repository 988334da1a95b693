"""Progress and notes for long-running work. The base class is silent; the command line's writes to
stderr.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]  # advance(examples, where=""): examples done since the last call


class Reporter:
    """Receives notes (what a user should know) and progress."""

    def note(self, message: str) -> None:
        """Report a message; a repeated message is dropped."""

    @contextmanager
    def progress(self, doing: str, total: int) -> Iterator[Advance]:
        """Work on `total` (checkpoint, example) pairs. Yields the function that advances it.

        `doing`: a label such as "gradients of train examples".
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
