"""How a table was made: command line, versions, and the request that it answers.

A parquet file holds this record in its metadata. Any other file FILE has it in FILE.meta.json, so
that each line of a JSONL file stays a row. A table on stdout, a device or a pipe has no record.
"""

import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from influence_cli import __version__
from influence_cli.errors import TableError
from influence_cli.storage.atomic import remove_stale_siblings, write_json
from influence_cli.storage.json_text import parse_sealed_json

KEY = "influence"  # of a parquet file's metadata
LARGEST_RECORD = 64 << 20  # bytes
Record = dict[str, Any]  # Any: JSON values
MakeRecord = Callable[[], Mapping[str, Any]]  # Any: JSON values


def describe_command() -> Record:
    """Command line and versions."""
    return {"command": sys.argv, "versions": list_versions()}


@cache
def list_versions() -> Mapping[str, str]:
    """The versions of influence, Python and the packages behind the numbers."""
    packages = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors")}
    return {"influence": __version__, "python": platform.python_version(), **packages}


def record_path(table: Path) -> Path:
    return table.with_name(f"{table.name}.meta.json")


def write_record(table: Path, record: Record) -> None:
    """Write the record beside a table, with the table's size and digest."""
    remove_stale_siblings(record_path(table))
    write_json(record_path(table), {**record, **digest_file(table)})


def digest_file(path: Path) -> Record:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}


def read_record(name: str) -> Record | None:
    """The record of a table; None if it has none.

    Raises TableError for a broken record, or one of a file with other bytes.
    """
    path = Path(name)
    if name == "-" or not path.is_file():
        return None
    if path.suffix.lower() == ".parquet":
        return read_parquet_record(path)
    place = record_path(path)
    if not place.is_file():
        return None
    if place.stat().st_size > LARGEST_RECORD:
        raise TableError(f"{place} is too large for a record of a table", "write the table again")
    record = parse_record(place, place.read_bytes())
    actual = digest_file(path)
    expected = {key: record.get(key) for key in actual}
    if expected != actual:
        raise TableError(
            f"{name} is not the table that {place.name} describes: it is cut short or was changed",
            f"found {actual['bytes']:,} bytes, expected {str(expected['bytes'])[:40]}"
            if actual["bytes"] != expected["bytes"]
            else "its size is right, its digest is not",
            f"write this table again; or delete {place} to use it without this check",
        )
    return record


def read_parquet_record(path: Path) -> Record | None:
    if importlib.util.find_spec("pyarrow") is None:
        return None
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = (pq.read_schema(path).metadata or {}).get(KEY.encode())
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path} can't be read: {error}", "write this table again") from error
    return parse_record(path, content) if content is not None else None


def parse_record(place: Path, content: bytes) -> Record:
    """Raises TableError if `content` is no record."""
    try:
        record = parse_sealed_json(content)
        if isinstance(record, dict):
            shard = record.get("shard")
            is_record = isinstance(record.get("request", {}), dict) and is_count(record.get("top"))
            if is_record and (shard is None or is_shard(shard)):
                return record
        problem = "not a record of a table"
    except ValueError as error:
        problem = str(error)[:200]
    raise TableError(f"{place} can't be read: {problem}", "write the table again")


def is_count(value: object) -> bool:
    return value is None or (type(value) is int and value >= 1)


def is_shard(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(number) is int for number in value)
        and 1 <= value[0] <= value[1]
    )
