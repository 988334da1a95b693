"""Writes vectors with the ids of their examples: as numpy files, or as Parquet tables.

Memory is flat in the number of vectors.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.output.formats import encodable
from influence_cli.output.table_record import Record
from influence_cli.progress import format_bytes
from influence_cli.storage.array_files import ArrayFile, create_file, create_folder, write_array
from influence_cli.storage.atomic import describe_disk_error, write_json
from influence_cli.storage.scratch import ScratchFolder

FORMATS = ("npy", "parquet")
FLOAT_BYTES = 4
GROUP_BYTES, GROUP_ROWS = 64 << 20, 64_000  # at most, of a Parquet row group

Block = tuple[int, int, np.ndarray]  # first row, first column, numbers (n, k) float32


@dataclass(frozen=True)
class VectorTable:
    """Vectors of one side. `name`, `ids_name`: of its files. `ids`: (N,) numbers or texts.

    `describe`: id -> label, text and the user's own id.
    """

    name: str
    ids_name: str
    ids: np.ndarray
    width: int
    blocks: Iterable[Block]
    describe: Callable[[Any], tuple[str, str, str]]  # Any: an int, or a text
    has_own_ids: bool

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.ids), self.width

    @property
    def nbytes(self) -> int:
        return FLOAT_BYTES * len(self.ids) * self.width


def check_folder_name(output: Path) -> None:
    """Raises UsageProblem unless a new folder can have this name."""
    if output.is_dir() and not any(output.iterdir()):
        return
    if output.exists() or output.is_symlink():
        raise UsageProblem(
            f"-o {output} exists", "expected: the name of a new folder, or of an empty one"
        )
    if not output.absolute().parent.is_dir():
        raise UsageProblem(
            f"-o {output}: the folder that would hold it does not exist",
            f"create that folder: mkdir -p {output.parent}",
        )


def check_room(output: Path, tables: Sequence[VectorTable], format: str) -> None:
    """Raises OutputError where the files do not fit on the disk. Parquet files are written from
    temporary numpy files.
    """
    size = sum(table.nbytes for table in tables) * (2 if format == "parquet" else 1)
    free = shutil.disk_usage(output.absolute().parent).free
    if size > free:
        raise OutputError(
            f"the vectors do not fit on the disk of {output}",
            f"needed: {size:,} bytes; free: {free:,} bytes",
            "--project K makes vectors smaller; --steps, --layers and --train select fewer numbers",
        )


def describe_sizes(tables: Sequence[VectorTable]) -> str:
    """`train 1,400 x 2,048, queries 10 x 2,048: float32, 11.6 MB`."""
    shapes = ", ".join(f"{t.name} {t.shape[0]:,} x {t.shape[1]:,}" for t in tables)
    return f"{shapes}: float32, {format_bytes(sum(table.nbytes for table in tables))}"


def write_vectors(
    output: Path, tables: Sequence[VectorTable], format: str, make_record: Callable[[], Record]
) -> None:
    """A folder that appears complete or not at all. Raises OutputError on a disk error."""
    output = output.absolute()
    try:
        with create_folder(output) as folder:
            if format == "parquet":
                with ScratchFolder(output.parent) as scratch:
                    for table in tables:
                        write_parquet_vectors(folder, scratch, table)
            else:
                for table in tables:
                    write_numpy_vectors(folder, table)
                    write_array(folder / f"{table.ids_name}.npy", table.ids)
            write_json(folder / "meta.json", dict(make_record()))
    except OSError as error:
        raise OutputError(
            describe_disk_error(output, error, output.parent),
            "nothing was written; free some space, or name another place: -o DIR",
        ) from error


def write_numpy_vectors(folder: Path, table: VectorTable) -> Path:
    path = folder / f"{table.name}.npy"
    with ArrayFile(path, table.shape) as file:
        for row, column, values in table.blocks:
            file.write(row, column, values)
    return path


def write_parquet_vectors(folder: Path, scratch: Path, table: VectorTable) -> None:
    """Columns id, label, text, vector, and own_id where the definition has id(example)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    id_type = pa.int64() if table.ids.dtype.kind == "i" else pa.string()
    vector_type = pa.list_(pa.float32(), table.width)
    fields = [("id", id_type), ("label", pa.string()), ("text", pa.string())]
    own = [("own_id", pa.string())] if table.has_own_ids else []
    schema = pa.schema([*fields, ("vector", vector_type), *own])
    with (
        write_numpy_vectors(scratch, table).open("rb") as numbers,
        create_file(folder / f"{table.name}.parquet") as file,
        pq.ParquetWriter(file, schema, use_dictionary=["label"]) as writer,
    ):
        for ids, values in read_groups(numbers, table):
            labels, texts, own_ids = describe_examples(table, ids)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), type=vector_type)
            cells = [ids, labels, texts, vectors, *([own_ids] if table.has_own_ids else [])]
            writer.write_table(pa.table(cells, schema=schema))


def read_groups(file: IO[bytes], table: VectorTable) -> Iterator[tuple[list[Any], np.ndarray]]:
    """Ids and flat vectors of a row group, from a numpy file. Any: an int, or a text."""
    np.lib.format.read_magic(file)
    np.lib.format.read_array_header_1_0(file)
    size = max(1, min(GROUP_ROWS, GROUP_BYTES // (FLOAT_BYTES * table.width)))
    for first in range(0, len(table.ids), size):
        ids = table.ids[first : first + size].tolist()
        yield ids, np.fromfile(file, "<f4", len(ids) * table.width)


def describe_examples(table: VectorTable, ids: list[Any]) -> list[list[Any]]:
    """Labels, texts and own ids. Any: an int, or a text."""
    texts = [tuple(map(encodable, table.describe(id))) for id in ids]
    return [list(column) for column in zip(*texts, strict=True)]
