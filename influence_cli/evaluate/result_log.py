"""A log of finished results, one JSON object per line. A later run continues it."""

import json
import os
from pathlib import Path
from typing import Any

from influence_cli.errors import CacheError, shown
from influence_cli.storage.atomic import LineLog, make_folders, report_disk_errors
from influence_cli.storage.json_text import parse_sealed_json, seal_json


class ResultLog:
    """`records`: those of the file, then the added ones. No file: in memory only."""

    def __init__(self, path: Path | None) -> None:
        """Drops an incomplete last line, which a killed process left.

        Raises CacheError for a file that can't be read.
        """
        self._path = path
        self.records: list[dict[str, Any]] = []  # Any: JSON
        if path is None or not path.is_file():
            return
        with report_disk_errors(path.parent):
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if len(complete) < len(content):
                os.truncate(path, len(complete))
        for number, line in enumerate(complete.split(b"\n")[:-1], start=1):
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

    def add(self, record: dict[str, Any]) -> None:
        """Append a record to the file and to `records`."""
        self.records.append(record)
        if self._path is not None:
            with report_disk_errors(self._path.parent):
                make_folders(self._path.parent, self._path.parent.parent)
                with LineLog(self._path) as log:
                    log.append(seal_json(json.dumps(record).encode()))
