"""The three standard streams: any of them may be closed or full when a command starts."""

import contextlib
import os
import sys
from typing import IO


def open_closed_streams() -> None:
    """Point each closed descriptor at /dev/null, so that no file of ours gets its number.

    stdin is then empty and stderr takes everything; a table for a closed stdout is refused.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        with contextlib.suppress(OSError):
            os.fstat(number)
            continue
        os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
        if name != "stdout":
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def flush_or_discard(stream: IO[str] | None) -> OSError | None:
    """Flush a stream. If that fails, send the rest of its buffer to /dev/null, so that the
    interpreter's last flush does not fail. Returns the error.
    """
    if stream is None:
        return None
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    except ValueError:  # closed
        return None
    return None
