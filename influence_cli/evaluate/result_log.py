"""A log of finished results, one JSON object per line. A later run continues it.

Several processes may share a log. Each one adds under a lock, and adds no record twice.
"""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from influence_cli.errors import CacheError, shown
from influence_cli.storage.atomic import (
    LineLog,
    make_folders,
    report_disk_errors,
    wait_for_lock,
)
from influence_cli.storage.json_text import parse_sealed_json, seal_json

Record = dict[str, Any]  # Any: JSON


def content_of(record: Record) -> Record:
    """A record without the seconds that it took, which are never the same twice."""
    return {name: value for name, value in record.items() if name != "seconds"}


def total_seconds(records: Iterable[Record]) -> float | None:
    """The seconds that these results took; None if an older version stored no seconds."""
    seconds = [record.get("seconds") for record in records]
    if not all(isinstance(value, int | float) for value in seconds):
        return None
    return float(sum(value for value in seconds if value is not None))


class ResultLog:
    """`records`: those of the file, then the added ones. No file: in memory only."""

    def __init__(self, path: Path | None) -> None:
        """Drops an incomplete last line, which a killed process left.

        Raises CacheError for a file that can't be read.
        """
        self._path = path
        self._bytes = self._lines = 0  # of the file, that `records` has
        self.records: list[Record] = []
        if path is not None and path.is_file():
            with report_disk_errors(path.parent), self._lock_file(path) as file:
                self._read_new_lines(path, file)

    def add(self, record: Record) -> bool:
        """Append a record to the file and to `records`, with what other processes have added since.
        Returns False, and appends nothing, where another process has added it.
        """
        if self._path is None:
            self.records.append(record)
            return True
        with report_disk_errors(self._path.parent):
            make_folders(self._path.parent, self._path.parent.parent)
            with LineLog(self._path) as log, self._lock_file(self._path) as file:
                self._read_new_lines(self._path, file)
                if content_of(record) in map(content_of, self.records):
                    return False
                line = seal_json(json.dumps(record).encode())
                log.append(line)
                self.records.append(record)
                self._bytes += len(line)
                self._lines += 1
                return True

    @contextmanager
    def _lock_file(self, path: Path) -> Iterator[int]:
        """A descriptor for reading, with the lock of the file."""
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            wait_for_lock(file)
            yield file
        finally:
            os.close(file)

    def _read_new_lines(self, path: Path, file: int) -> None:
        """Add the lines that other processes have written since."""
        size = os.fstat(file).st_size
        content = os.pread(file, max(0, size - self._bytes), self._bytes)
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(path, self._bytes + len(complete))
        for number, line in enumerate(complete.split(b"\n")[:-1], start=self._lines + 1):
            try:
                record = parse_sealed_json(line)
                if not isinstance(record, dict):
                    raise ValueError(f"expected a JSON object, found {shown(record)}")
            except ValueError as error:
                raise CacheError(
                    f"{path} line {number} can't be read: {error}",
                    "delete the file; the same command computes its results again",
                ) from error
            self.records.append(record)
            self._bytes += len(line) + 1
            self._lines += 1
