"""Writes and reads tables as csv, tsv, jsonl and parquet.

Rows are written and read one by one, so memory does not grow with the table.
"""

import csv
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from influence_cli.errors import UsageProblem, listed, shown
from influence_cli.output.columns import FLOATS, IDS, WHOLE_NUMBERS, Row
from influence_cli.output.table_record import KEY, Record
from influence_cli.storage.json_text import MAX_BYTES, parse_json

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n")
DELIMITERS = {"csv": ",", "tsv": "\t"}
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is too low for texts
FIRST_ROWS = 1000  # of a parquet file: they decide whether ids are integers
ROW_GROUP = 64_000  # rows of a parquet row group
READ_BATCH = 1024  # rows of a parquet file in memory
LONGEST_REASON = 200  # characters of pyarrow's message

NumberedRow = tuple[int, list[Any]]  # line number, cells; Any: a number, a str or None


def format_of(path: Path) -> str:
    """The format of a file name's ending; csv for an unknown ending."""
    return SUFFIXES.get(path.suffix.lower(), "csv")


def require_pyarrow(subject: str) -> None:
    """Raises UsageProblem if pyarrow is not installed."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageProblem(
            f"{subject} needs pyarrow", "install it: pip install 'influence-cli[parquet]'"
        )


# ---------------------------------------------------------------- writing
def write_rows(
    rows: Iterable[Row],
    columns: Sequence[str],
    format: str,
    file: IO[str],
    record: Record | None = None,
) -> None:
    """Write the header and the rows. `format`: csv, tsv, jsonl or parquet, which takes `record`."""
    if format == "parquet":
        write_parquet(iter(rows), columns, file, record)
    elif format == "jsonl":
        for row in rows:
            file.write(encode_json_row(row, columns) + "\n")
    else:
        # csv quotes the characters of its line end only: \r\n, so that a lone \r is quoted, too
        lines = LineFeeds(file)
        writer = csv.writer(lines, delimiter=DELIMITERS[format], lineterminator="\r\n")
        writer.writerow(columns)
        writer.writerows(rows)  # csv writes the repr of a float: every digit


def encode_json_row(row: Row, columns: Sequence[str]) -> str:
    """One line. A lone surrogate, which a JSON text may not hold, becomes text, as in csv."""
    text = json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False)
    if text.isascii():
        return text
    cells = dict(zip(columns, map(encodable, row), strict=True))
    return json.dumps(cells, ensure_ascii=False)


class LineFeeds:
    """Ends each line of a csv writer, which ends with CR LF, with LF."""

    def __init__(self, file: IO[str]) -> None:
        self._write = file.write

    def write(self, line: str) -> None:
        self._write(line[:-2] + "\n")


def prefix_formulas(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Row]:
    """The rows for a spreadsheet: a text that it would run begins with an apostrophe."""
    numbers = FLOATS | WHOLE_NUMBERS
    texts = [at for at, name in enumerate(columns) if name not in numbers]
    for row in rows:
        cells = list(row)
        for at in texts:
            if isinstance(cells[at], str) and cells[at].startswith(FORMULA_STARTS):
                cells[at] = "'" + cells[at]
        yield cells


def write_parquet(
    rows: Iterator[Row], columns: Sequence[str], file: IO[str], record: Record | None
) -> None:
    """A column of ids is int64 if the first rows hold integers there, else string."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first_rows = list(itertools.islice(rows, FIRST_ROWS))

    def type_of(position: int, name: str) -> Any:  # Any: pyarrow has no types
        if name in FLOATS:
            return pa.float64()
        holds_ids = name in IDS and all(isinstance(row[position], int) for row in first_rows)
        return pa.int64() if holds_ids or name in WHOLE_NUMBERS else pa.string()

    schema = pa.schema([(name, type_of(at, name)) for at, name in enumerate(columns)])
    if record is not None:
        schema = schema.with_metadata({KEY: json.dumps(record)})
    row_groups = iter(lambda: list(itertools.islice(rows, ROW_GROUP)), [])
    file.flush()
    binary = file.buffer  # type: ignore[attr-defined]  # IO[str] lacks it, text files have it
    with pq.ParquetWriter(binary, schema, write_page_checksum=True) as writer:
        for group in itertools.chain([first_rows], row_groups):
            cells = [list(map(encodable, cells)) for cells in zip(*group, strict=True)]
            cells = cells or [[] for _ in columns]
            for at, field in enumerate(schema):
                if field.type == pa.string():  # a column of ids can mix `all` with numbers
                    cells[at] = [cell if cell is None else str(cell) for cell in cells[at]]
            writer.write_table(pa.table(cells, schema=schema))


def encodable(cell: object) -> object:
    """A lone surrogate, which has no UTF-8, as `\\ud800`; all else unchanged."""
    if not isinstance(cell, str) or cell.isascii():
        return cell
    return cell.encode(errors="backslashreplace").decode()


# ---------------------------------------------------------------- reading
def read_rows(name: str, stdin: IO[str]) -> Iterator[NumberedRow]:
    """The header, then the rows, of a file in the format of its name's ending.

    `-` is csv from stdin. A broken file raises csv.Error, ValueError or OSError.
    """
    format = "csv" if name == "-" else format_of(Path(name))
    if format == "parquet":
        yield from read_parquet(Path(name))
        return
    if format == "jsonl":
        with Path(name).open("rb") as lines:
            yield from read_jsonl(lines)
        return
    with (
        nullcontext(stdin) if name == "-" else Path(name).open(encoding="utf-8", newline="") as file
    ):
        yield from read_csv(file, DELIMITERS[format])


def read_csv(file: IO[str], delimiter: str) -> Iterator[NumberedRow]:
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(file, delimiter=delimiter)
    for number, cells in enumerate(reader):
        if not number and not cells:
            raise ValueError("its first line is empty; expected a header line")
        yield reader.line_num, cells
    if not reader.line_num:
        raise ValueError("the file is empty; expected a header line")


def read_jsonl(file: IO[bytes]) -> Iterator[NumberedRow]:
    columns: list[str] = []
    for line, text in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), start=1):
        row = parse_json(text, finite=False)
        if not isinstance(row, dict) or not row:
            raise ValueError(f"found {shown(row)}, expected a JSON object with columns")
        if not columns:
            columns = list(row)
            yield 0, columns
        if list(row) != columns:
            raise ValueError(f"found {shown_names(row)}, expected {shown_names(columns)}")
        yield line, list(row.values())


def shown_names(columns: Iterable[str]) -> str:
    """The names of columns, short enough for an error message."""
    return listed((name[:30] for name in columns), 12)


def read_parquet(path: Path) -> Iterator[NumberedRow]:
    require_pyarrow(f"{path}: parquet")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield 0, list(file.schema_arrow.names)
            rows = (
                zip(*(column.to_pylist() for column in batch.columns), strict=True)
                for batch in file.iter_batches(batch_size=READ_BATCH)
            )
            line = 0
            for line, cells in enumerate(itertools.chain.from_iterable(rows), start=1):
                yield line, list(cells)
            if line != file.metadata.num_rows:
                raise ValueError(f"{line:,} rows, and its footer says {file.metadata.num_rows:,}")
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(str(error)[:LONGEST_REASON]) from error
