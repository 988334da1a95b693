"""The one way this package writes a file: a temporary name beside it, a sync, a rename.

A reader sees the complete file or none. A killed process leaves only its temporary file, which
`remove_stale_files` deletes later. The folder is not synced: a rename that a power cut undoes
costs one file, and the next run writes it again.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from influence_cli.errors import CacheError
from influence_cli.storage.json_text import parse_sealed_json, read_at_most, seal_json

LEASE_SECONDS = 3600  # writing changes a file's time, so a file that old has no writer
DAY_SECONDS = 24 * 3600


# ---------------------------------------------------------------- writing
@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. On success syncs it and renames it to `path`; on an
    error removes it."""
    temporary, descriptor = create_temporary(path)
    try:
        # of the file that it replaces, else by the user's umask; some writers set 0600
        mode = (path.stat() if path.exists() else os.fstat(descriptor)).st_mode
        yield temporary
        os.fchmod(descriptor, stat.S_IMODE(mode))
        os.fsync(descriptor)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def create_temporary(path: Path) -> tuple[Path, int]:
    """A new empty file beside `path`, with a random name, and its descriptor.

    The descriptor holds a lock on the file, which the system releases when the process ends:
    `remove_stale_files` leaves a locked file alone.
    """
    while True:
        name = f".tmp-{socket.gethostname()}-{secrets.token_hex(8)}-{path.name[-40:]}"
        temporary = path.with_name(name)
        descriptor = os.open(
            temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666
        )
        # None: no locks here, so remove_stale_files waits. A sweep may have got the lock first
        if lock_file(descriptor) is not False and os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        temporary.unlink(missing_ok=True)
        os.close(descriptor)


def lock_file(descriptor: int) -> bool | None:
    """Whether this process got the file's lock; None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait_for_lock(descriptor: int) -> None:
    """Waits until this process has the file's lock. Without locks it does not wait."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextmanager
def replace_text_file(path: Path) -> Iterator[IO[str]]:
    """The same, as an open text file in UTF-8 with LF line ends."""
    with (
        replace_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        yield file
        file.flush()


def open_special(path: Path) -> IO[str]:
    """An open device or pipe, to be written as it is."""
    return path.open("w", encoding="utf-8", newline="\n")


def write_bytes(path: Path, content: bytes) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:  # Any: JSON values
    """With a checksum, which `read_json` compares."""
    write_bytes(path, seal_json(json.dumps(content, indent=1).encode()))


def make_folders(folder: Path, root: Path) -> None:
    """Makes a folder below `root` and those between, but never `root`: if it vanished during the
    work, a new one would lack the files that say what it is. Raises FileNotFoundError then.
    """
    path = root
    for name in folder.relative_to(root).parts:
        path /= name
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):  # by another process, meanwhile
                path.mkdir()


class LineLog:
    """A file that grows by whole lines. A killed process leaves at most one incomplete line."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, line: bytes) -> None:
        """Adds a line, which must end with a newline. Does not sync."""
        while line:  # one call, unless the disk is full
            line = line[os.write(self._file, line) :]

    def sync(self) -> None:
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


# ---------------------------------------------------------------- reading and errors
def read_json(
    path: Path, remedy: str = "delete that file: influence makes it again"
) -> dict[str, Any]:  # Any: JSON values
    """Raises CacheError for a file that is unreadable, was changed, or holds no JSON object."""
    try:
        content = parse_sealed_json(read_at_most(path))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise CacheError(f"{path} can't be read: {error}", remedy) from error


def describe_disk_error(name: object, error: OSError, folder: Path | None = None) -> str:
    """The first line of an error about `name`, which can't be written. One text for a full disk.

    `folder`: on the disk in question, to report its free space.
    """
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return f"{name} can't be written: {error.strerror or error}"
    if folder is None:
        return f"{name} can't be written: the disk is full"
    free = shutil.disk_usage(next(at for at in (folder, *folder.parents) if at.exists())).free
    return f"{name} can't be written: the disk is full ({free:,} bytes free)"


@contextmanager
def report_disk_errors(folder: Path) -> Iterator[None]:
    """Turns a full disk, a read-only cache folder or one that vanished into a CacheError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise CacheError(
                describe_disk_error(f"the cache {folder}", error),
                f"missing: {error.filename}, which was probably removed during the work",
                "re-run the command: it computes the missing gradients again",
            ) from error
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheError(
            describe_disk_error(f"the cache {folder}", error, folder),
            *(["free some space and re-run the command: finished units are kept"] if full else []),
            "or move it with --cache DIR, halve it with --store float16, omit it with --cache none"
            if full
            else "move it with --cache DIR, or omit it with --cache none",
        ) from error


# ---------------------------------------------------------------- leftovers
def remove_stale_files(folder: Path) -> None:
    """Removes the temporary files of killed processes in a folder and below it."""
    for path in folder.rglob(".tmp-*"):
        remove_if_stale(path)


def remove_stale_siblings(path: Path) -> None:
    """Removes the temporary files that killed processes left when they wrote `path`."""
    for temporary in path.parent.glob(".tmp-*"):
        if temporary.name.endswith(f"-{path.name[-40:]}"):
            remove_if_stale(temporary)


def remove_if_stale(path: Path) -> None:
    """Removes a temporary file that nobody locks. A file system may not show the locks of other
    hosts, so a file of theirs must also be LEASE_SECONDS old; it must be a day old where there are
    no locks."""
    match = re.match(r"\.tmp-(.*)-[0-9a-f]{16}-", path.name)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return  # a folder or a link, of another user, or removed meanwhile
    try:
        lock = lock_file(descriptor)
        age = time.time() - os.fstat(descriptor).st_mtime
        if lock and match is not None:
            stale = match[1] == socket.gethostname() or age > LEASE_SECONDS
        else:
            stale = lock is not False and age > DAY_SECONDS
        if stale:
            path.unlink(missing_ok=True)
    except OSError:
        return  # its folder can't be written; a temporary file that stays does no harm
    finally:
        os.close(descriptor)
