"""The one way this package writes a file: a temporary name beside it, a sync, a rename.

A reader sees the complete file or none. A killed process leaves only its temporary file, which
`remove_stale_files` deletes later. The folder is not synced: a rename that a power cut undoes
costs one file, and the next run writes it again.
"""

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from influence_cli.errors import CacheError


# ---------------------------------------------------------------- writing
@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to. On success syncs it and renames it to `path`; on an
    error removes it."""
    temporary = path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; some writers set 0600
        yield temporary
        temporary.chmod(mode)
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_text_file(path: Path) -> Iterator[IO[str]]:
    """The same, as an open text file in UTF-8 with LF line ends."""
    with (
        replace_file(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        yield file
        file.flush()


def write_bytes(path: Path, content: bytes) -> None:
    with replace_file(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:  # Any: JSON values
    write_text(path, json.dumps(content, indent=1) + "\n")


def sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
def read_json(path: Path) -> dict[str, Any]:  # Any: JSON values
    """Raises CacheError for a file that is unreadable or holds no JSON object."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}")
        return content
    except (OSError, ValueError) as error:
        raise CacheError(
            f"{path} can't be read: {error}", "delete the cache folder to recompute it"
        ) from error


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
    """Turns a full disk or a read-only cache folder into a CacheError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise CacheError(
            describe_disk_error(f"the cache {folder}", error, folder),
            *(["free some space and re-run the command: finished units are kept"] if full else []),
            "or move it with --cache DIR, halve it with --store float16, omit it with --cache none"
            if full
            else "move it with --cache DIR, or omit it with --cache none",
        ) from error


# ---------------------------------------------------------------- leftovers
def remove_stale_files(folder: Path, hours: float = 24) -> None:
    """Removes the temporary files of killed processes: on this machine where the process no longer
    exists, and any that are older than `hours`."""
    for path in folder.rglob(".tmp-*"):
        match = re.match(r"\.tmp-(.*)-(\d+)-", path.name)
        stale = (
            match is not None
            and match[1] == socket.gethostname()
            and Path("/proc/self").exists()
            and not Path(f"/proc/{match[2]}").exists()
        )
        try:
            if stale or time.time() - path.stat().st_mtime > hours * 3600:
                path.unlink()
        except OSError:
            continue  # another process has removed it
