"""The changes that a process makes to files: counts them, and acts right before one of them.

So a trial can kill a process, or let its disk fail, at each place where that matters.
"""

import itertools
import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# audit events of Python whose first argument is a path
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# (number from 1, kind, path if it is known): may kill the process or raise an error
Act = Callable[[int, str, str | None], None]


class SharedCount:
    """A number that a fork sets and its parent reads."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8)

    def set(self, value: int) -> None:
        self._memory[:] = value.to_bytes(8, "little")

    def get(self) -> int:
        return int.from_bytes(self._memory[:], "little")


def watch_changes(place: Path, act: Act, count: SharedCount | None = None) -> None:
    """Call `act` before each change of a file below `place`, until this process ends.

    Kinds: open, write, fsync, and the names of EVENTS. What C code writes by itself is not seen.
    """
    numbers, root = itertools.count(1), f"{place}{os.sep}"

    def notice(kind: str, path: str | None = None) -> None:
        number = next(numbers)
        if count is not None:
            count.set(number)
        act(number, kind, path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:  # Any: those of the event
        if event == "open":
            path, mode, flags = arguments
            if is_inside(path, root) and (flags & WRITING or set(mode or "") & set("wax+")):
                notice("open", os.fspath(path))
        elif event in EVENTS and is_inside(arguments[0], root):
            notice(event, os.fspath(arguments[0]))

    def before(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:  # Any: those of `call`
        def noticed(*arguments: Any) -> Any:
            notice(kind)
            return call(*arguments)

        return noticed

    os.fsync = before("fsync", os.fsync)
    os.write = before("write", os.write)
    sys.addaudithook(hook)


def is_inside(path: object, root: str) -> bool:
    return isinstance(path, str | os.PathLike) and os.path.abspath(path).startswith(root)
