"""Stops work that takes too long."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """The time is over. Not an Exception, so that the work does not handle it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Stopped in the block after these seconds. For the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
