"""Writes numpy files (.npy) that are larger than memory."""

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from influence_cli.storage.scratch import ScratchFolder, reserve_room

FLOAT_BYTES = 4


@contextmanager
def create_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `path`. On success renames it to `path`, which must be
    absent or an empty folder; on an error removes it. The next command that calls this in the same
    place removes what a killed one left. Raises OSError.
    """
    with ScratchFolder(path.parent) as scratch:
        folder = scratch / path.name
        folder.mkdir()
        yield folder
        os.rename(folder, path)


class ArrayFile:
    """A new file of float32 numbers, which is written in rectangles, in any order.

    It gets its room on the disk at once. No page of it is mapped, so memory stays flat.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        """Raises OSError, such as one of a full disk."""
        header = io.BytesIO()
        fields = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(header, fields)
        self.width, self._start = shape[1], header.tell()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            reserve_room(self._file, self._start + FLOAT_BYTES * math.prod(shape))
            self._write_at(0, memoryview(header.getvalue()))
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> "ArrayFile":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, row: int, column: int, values: np.ndarray) -> None:
        """Write a rectangle (n, k) whose first number has this row and column."""
        values = np.ascontiguousarray(values, "<f4")
        stretches = [values] if values.shape[1] == self.width else values  # else row by row
        step = FLOAT_BYTES * self.width
        first = self._start + row * step + FLOAT_BYTES * column
        for number, stretch in enumerate(stretches):
            self._write_at(first + number * step, memoryview(stretch).cast("B"))

    def _write_at(self, place: int, content: memoryview) -> None:
        while content:
            size = os.pwrite(self._file, content, place)
            content, place = content[size:], place + size


def write_array(path: Path, values: np.ndarray) -> None:
    """A small array as a new file. Raises OSError."""
    with create_file(path) as file:
        np.lib.format.write_array(file, values, allow_pickle=False)


@contextmanager
def create_file(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file in a folder of create_folder, synced at the end."""
    with path.open("xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
