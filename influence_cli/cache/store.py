"""The cache folder: its version, its unit files, and the thread that writes them.

The names follow from the content (docs/cache-format.md):

.influence/cache.json                                    format and version
.influence/<settings>/<checkpoint>/<split>/<columns>/    one folder per set of columns
    columns.json                                         lists them
    000000000000-000000000512.safetensors                a unit: every example of this range
    000000000000-000000000512-1f0c9a3e.safetensors       a unit: some of them, with their digest
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.unit_file import (
    Level,
    Unit,
    UnitContent,
    decode_unit,
    encode_unit,
    read_ids,
)
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.cache.verification import Verification
from influence_cli.errors import CacheError
from influence_cli.storage.atomic import (
    make_folders,
    read_json,
    report_disk_errors,
    write_json,
    write_text,
)
from influence_cli.storage.safetensors_io import write_tensors

FORMAT, VERSION = "influence-cache", 3
# bytes of a unit's gradients: what a kill costs at most, and what a reader has in memory at once
UNIT_BYTES = 128 << 20
UNIT_EXAMPLES = 4096
DIRECT_FROM = 1 << 30  # bytes; a command that writes more bypasses the page cache
UNIT_NAME = re.compile(r"(\d{12})-(\d{12})(-[0-9a-f]{8})?\.safetensors")


class Store:
    """An opened cache folder. Writers need no lock: a unit's name follows from its content, and
    its file appears complete or not at all."""

    def __init__(self, folder: Path, verify: bool = False) -> None:
        """Opens a cache or creates one. `verify`: compare all that is read with its checksums.
        Raises CacheError: another folder, another version, a folder that can't be written."""
        self.folder, self.verification = folder, Verification(verify)
        head = folder / "cache.json"
        if head.is_file():
            check_version(folder, head)
            return
        # by another process that creates the cache now, or by one that was killed
        harmless = (".tmp-", ".gitignore")
        if folder.is_dir() and any(not path.name.startswith(harmless) for path in folder.iterdir()):
            raise CacheError(
                f"{folder} is not an influence cache",
                "found: other files, and no cache.json",
                "--cache DIR names an empty or a new folder",
            )
        with report_disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / ".gitignore", "*\n")
            write_json(head, {"format": FORMAT, "version": VERSION})  # last: it ends the creation

    # ------------------------------------------------------------ reading
    def index_units(self, place: Path) -> UnitIndex:
        """The units of one (settings, checkpoint, split) folder, in the order of their names."""
        units: list[Unit] = []
        for folder in sorted(place.glob("*/")) if place.is_dir() else ():
            if (folder / "columns.json").is_file():  # else a process was killed before its unit
                units += list_units(folder)
        return UnitIndex(units, self.verification)

    # ------------------------------------------------------------ writing
    def unit_for(
        self,
        place: Path,
        columns: Sequence[str],
        level: Level,
        definition: str,
        start: int,
        stop: int,
        ids: np.ndarray,
    ) -> Unit:
        """The unit for these examples of start..stop, named after its content."""
        folder = place / columns_digest(columns, level, definition)
        name = f"{start:012d}-{stop:012d}"
        some_ids = None
        if len(ids) < stop - start:
            some_ids = ids
            name += f"-{ids_digest(ids)}"
        file_name = f"{name}.safetensors"
        return Unit(folder, file_name, tuple(columns), level, definition, start, stop, some_ids)

    def write(
        self,
        unit: Unit,
        rows: GradientRows,
        storage_dtype: torch.dtype | None,
        direct: bool = False,
    ) -> None:
        """Writes a unit. `storage_dtype` None: as computed. `direct`: bypasses the page cache.

        Raises CacheError for a full or read-only disk.
        """
        self.write_content(unit, encode_unit(unit, rows, storage_dtype), direct)

    def write_content(self, unit: Unit, content: UnitContent, direct: bool = False) -> None:
        with report_disk_errors(self.folder):
            make_folders(unit.folder, self.folder)
            self.list_columns(unit)
            write_tensors(unit.path, content.tensors, content.metadata, direct)

    def list_columns(self, unit: Unit) -> None:
        """Writes the columns.json of the unit's folder, if it is absent."""
        path = unit.folder / "columns.json"
        if not path.is_file():
            content = {
                "columns": list(unit.columns),
                "level": unit.level,
                "definition": unit.definition,
            }
            with report_disk_errors(self.folder):
                write_json(path, content)

    @contextmanager
    def writer(self, storage_dtype: torch.dtype | None, size: int) -> Iterator["UnitWriter"]:
        """Yields a writer that returns while the disk works: the caller computes the next unit
        while a thread writes one. On exit all units are written.

        `storage_dtype` None: as computed. `size`: bytes to be written in all; many bypass the page
        cache.
        """
        with ThreadPoolExecutor(1) as thread:
            writer = UnitWriter(self, storage_dtype, size > DIRECT_FROM, thread)
            yield writer
            writer.finish()


class UnitWriter:
    """Writes one unit at a time in a thread."""

    def __init__(
        self,
        store: Store,
        storage_dtype: torch.dtype | None,
        direct: bool,
        thread: ThreadPoolExecutor,
    ) -> None:
        self._store, self._dtype, self._direct, self._thread = store, storage_dtype, direct, thread
        self._pending: list[Future[None]] = []

    def write(self, unit: Unit, rows: GradientRows) -> None:
        """Write a unit, which the thread encodes."""
        self.finish()
        arguments = unit, rows, self._dtype, self._direct
        self._pending.append(self._thread.submit(self._store.write, *arguments))

    def write_and_decode(self, unit: Unit, rows: GradientRows) -> GradientRows:
        """Write a unit; returns its rows as a read would return them. Neither may be changed."""
        content = encode_unit(unit, rows, self._dtype)
        self.finish()
        arguments = unit, content, self._direct
        self._pending.append(self._thread.submit(self._store.write_content, *arguments))
        return decode_unit(unit, content)

    def finish(self) -> None:
        """Wait until all units are written. Raises what the writing raised."""
        while self._pending:
            self._pending.pop().result()


def columns_digest(columns: Sequence[str], level: Level, definition: str) -> str:
    """The name of the folder of units with these columns."""
    kind = json.dumps([list(columns), level, definition]).encode()
    return hashlib.sha256(kind).hexdigest()[:12]


def ids_digest(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:8]


def check_version(folder: Path, head: Path) -> None:
    """Raises CacheError where cache.json is of another format or version."""
    content = read_json(head, "delete the cache folder to recompute it")
    if content.get("format") != FORMAT:
        raise CacheError(
            f"{folder} is not an influence cache",
            f"found: cache.json with the format {content.get('format')!r}; expected: {FORMAT!r}",
            "--cache DIR names another folder",
        )
    if content.get("version") != VERSION:
        raise CacheError(
            f"the cache {folder} has another version",
            f"found: version {content.get('version')!r}; expected: version {VERSION}",
            "--cache DIR names another folder; or delete this one to recompute it",
        )


def list_units(folder: Path) -> Iterator[Unit]:
    """The units of a folder with a columns.json. Raises CacheError where that is invalid."""
    listing = folder / "columns.json"
    head = read_json(listing, f"delete {folder}, and re-run the command to recompute it")
    if (
        not isinstance(head.get("columns"), list)
        or head.get("level") not in ("values", "norms")
        or not isinstance(head.get("definition"), str)
        or columns_digest(head["columns"], head["level"], head["definition"]) != folder.name
    ):
        raise CacheError(
            f"{listing} is damaged",
            f"expected: the columns, level and definition whose digest is {folder.name}",
            f"delete {folder}, and re-run the command to recompute it",
        )
    columns, level, definition = tuple(head["columns"]), head["level"], head["definition"]
    for name in sorted(os.listdir(folder)):
        if match := UNIT_NAME.fullmatch(name):
            ids = read_ids(folder / name) if match[3] else None
            start, stop = int(match[1]), int(match[2])
            if ids is not None and match[3] != f"-{ids_digest(ids)}":
                raise CacheError(
                    f"the cache file {folder / name} is damaged",
                    "found: other examples than its name says",
                    "delete it, and re-run the command to recompute its content",
                )
            yield Unit(folder, name, columns, level, definition, start, stop, ids)
