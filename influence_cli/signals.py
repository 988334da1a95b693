"""What SIGINT and SIGTERM do: exit codes 130 and 143, no stack trace.

The first signal is an exception, so that temporary files are removed. A second one, and one
before the command runs or after it, ends the process at once.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

NUMBERS = (signal.SIGINT, signal.SIGTERM)
RESEND_SECONDS = 0.01


class Terminated(BaseException):
    """SIGTERM as an exception."""


def exit_at_once(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def interrupt(number: int, frame: FrameType | None) -> NoReturn:
    handle_signals(exit_at_once)
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def handle_signals(handler: Callable[[int, FrameType | None], NoReturn]) -> None:
    """Install a handler, but not for a signal that the shell told us to ignore (nohup, `&`)."""
    for number in NUMBERS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def send_again(number: int) -> None:
    """Send a signal that Python lost to this process, a moment later."""
    handle_signals(interrupt)
    timer = threading.Timer(RESEND_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def report_unraisable(error: "sys.UnraisableHookArgs") -> None:
    """Python ignores an exception in a finalizer: a signal that comes there must come again."""
    if isinstance(error.exc_value, KeyboardInterrupt):
        send_again(signal.SIGINT)
    elif isinstance(error.exc_value, Terminated):
        send_again(signal.SIGTERM)
    else:
        sys.__unraisablehook__(error)


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which the first signal is a KeyboardInterrupt or Terminated."""
    before = {number: signal.getsignal(number) for number in NUMBERS}
    hook, sys.unraisablehook = sys.unraisablehook, report_unraisable
    handle_signals(interrupt)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
