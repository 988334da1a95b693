"""Temporary data that is too large for memory. Its folder is deleted when the command ends.

Nobody reads it after a crash, so it needs no sync and no rename. A process locks its folder as long
as it lives, so the next command can remove the folders of killed ones.
"""

import errno
import gzip
import math
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np

from influence_cli.storage.atomic import DAY_SECONDS, lock_file

NAME = re.compile(r"\.tmp-(.*)-[0-9a-f]{16}-influence-scratch")


class ScratchFolder:
    """A new folder that only this user can open. It is removed when the block ends, or with the
    object. Raises OSError."""

    def __init__(self, parent: Path) -> None:
        remove_stale_folders(parent)
        while True:
            name = f".tmp-{socket.gethostname()}-{secrets.token_hex(8)}-influence-scratch"
            self.path = parent / name
            self.path.mkdir(mode=0o700)
            try:
                descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except FileNotFoundError:  # the sweep of another process has removed it
                continue
            # None: no locks here, so folders go by age. A sweep may have got the lock first
            if lock_file(descriptor) is not False and self.path.is_dir():
                break
            os.close(descriptor)
        self._remove = weakref.finalize(self, remove_folder, self.path, descriptor)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self._remove()


def remove_folder(path: Path, descriptor: int) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.close(descriptor)


def remove_stale_folders(parent: Path) -> None:
    """Removes the scratch folders of killed processes. One of another host, whose locks this host
    may not see, must be a day old."""
    for path in list(parent.glob(".tmp-*-influence-scratch")):
        if (match := NAME.fullmatch(path.name)) is None:
            continue
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue  # a link, of another user, or removed meanwhile
        lock, age = lock_file(descriptor), time.time() - os.fstat(descriptor).st_mtime
        here = lock is True and match[1] == socket.gethostname()
        if here or (lock is not False and age > DAY_SECONDS):
            shutil.rmtree(path, ignore_errors=True)
        os.close(descriptor)


def spill_arrays(path: Path, arrays: Iterable[np.ndarray]) -> None:
    """Writes arrays one after the other, as raw numbers."""
    with path.open("wb") as file:
        for array in arrays:
            array.tofile(file)


def map_zeros(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped float64 array of zeros in a new file. Raises OSError where it has no room.

    The file gets its room at once: a process that writes to a mapped page for which the disk has
    no room is killed by SIGBUS.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        reserve_room(file.fileno(), 8 * math.prod(shape))
    return np.memmap(path, dtype=np.float64, mode="r+", shape=shape)


def reserve_room(descriptor: int, size: int) -> None:
    """Makes an empty file `size` bytes long, with room on the disk where the system can do that."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            return os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.truncate(descriptor, size)


def decompress_gzip(file: IO[bytes]) -> IO[bytes]:
    """A nameless temporary file with what a gzip file holds. Raises OSError, EOFError or zlib.error
    for a broken one, and OSError where there is no room."""
    content = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
    with gzip.GzipFile(fileobj=file) as packed:
        shutil.copyfileobj(packed, content, 1 << 20)
    content.flush()
    return content
