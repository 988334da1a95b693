"""Tables of texts: csv, tsv and JSON lines, each also compressed by gzip.

One pass checks every row and notes where it begins: eight bytes of memory a row.
"""

import csv
import io
import os
import threading
import zlib
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from influence_cli.errors import DataError, shown
from influence_cli.integrations.tables import Table, check_columns
from influence_cli.storage.json_text import MAX_BYTES, parse_json
from influence_cli.storage.scratch import decompress_gzip

BOM = b"\xef\xbb\xbf"
LONGEST_CELL = 1 << 30  # characters; csv's own limit of 131,072 is too low for texts


class RowBytes:
    """The bytes of a file, or of what a .gz file holds, at any offset. Threads and forks may share
    it; a pickled copy opens the file again."""

    def __init__(self, path: Path) -> None:
        self._path, self._state = path, file_state(path.stat())
        self._lock = threading.Lock()
        self._opened: IO[bytes] | None = None

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        return {"_path": self._path, "_state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:  # Any: attributes
        self.__dict__.update(state, _opened=None, _lock=threading.Lock())

    def file(self) -> IO[bytes]:
        """The open file. Raises DataError where it is not the file that was indexed."""
        with self._lock:
            if self._opened is None:
                if not self._is_same():
                    self._refuse_change()
                file = self._path.open("rb")
                self._opened = file
                if self._path.suffix.lower() == ".gz":
                    with file:
                        self._opened = decompress_gzip(file)
            return self._opened

    def read(self, start: int, stop: int) -> bytes:
        """These bytes, without the file's position, which threads and forks share."""
        content = os.pread(self.file().fileno(), stop - start, start)
        if len(content) != stop - start or not self._is_same():
            self._refuse_change()
        return content

    def _is_same(self) -> bool:
        try:
            return file_state(self._path.stat()) == self._state
        except OSError:  # removed
            return False

    def _refuse_change(self) -> NoReturn:
        raise DataError(f"{self._path} changed while it was read", "run the same command again")


def file_state(status: os.stat_result) -> tuple[int, int]:
    """Size and time: they differ where a file was written again."""
    return status.st_size, status.st_mtime_ns


class CountedLines:
    """The lines of a text, and the bytes before the next one."""

    def __init__(self, lines: Iterator[str], offset: int) -> None:
        self._lines, self.offset = lines, offset

    def __iter__(self) -> "CountedLines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += len(line) if line.isascii() else len(line.encode())
        return line


class TextTable(Table):
    """Rows whose bytes begin at `offsets`; the last offset is where the last row ends."""

    def __init__(
        self, path: Path, columns: tuple[str, ...], content: RowBytes, offsets: "array[int]"
    ) -> None:
        super().__init__(path, columns)
        self._content, self._offsets = content, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _bytes(self, index: int) -> bytes:
        return self._content.read(*self._offsets[index : index + 2])


class CsvTable(TextTable):
    delimiter = ","

    def _row(self, index: int) -> dict[str, Any]:
        lines = io.StringIO(self._bytes(index).decode(), newline="")
        cells = next(csv_reader(lines, self.delimiter))
        return dict(zip(self.columns, cells, strict=True))


class TsvTable(CsvTable):
    delimiter = "\t"


class JsonLinesTable(TextTable):
    def _row(self, index: int) -> dict[str, Any]:
        return parse_json(self._bytes(index), finite=False)


def csv_reader(lines: Iterator[str], delimiter: str) -> Any:  # Any: csv does not name its type
    """A reader that refuses a quote that does not close, which would swallow the rows behind it."""
    csv.field_size_limit(LONGEST_CELL)
    return csv.reader(lines, delimiter=delimiter, strict=True)


@contextmanager
def report_broken_text(path: Path, content: RowBytes) -> Iterator[IO[bytes]]:
    """Yields the file at its first row, behind a byte order mark. Turns what a broken file raises
    into DataError."""
    try:
        file = content.file()
        file.seek(0)
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        yield file
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, line {find_undecodable_line(content.file())} is not UTF-8",
            f"found: the byte 0x{error.object[error.start]:02x}",
            f"convert the file, for example: iconv -f latin1 -t utf-8 {path}",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}", "write or copy the file again") from error


def find_undecodable_line(file: IO[bytes]) -> int:
    file.seek(0)
    for number, line in enumerate(file, start=1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def index_csv(path: Path, delimiter: str) -> CsvTable:
    """Raises DataError: no header, a column name twice, a row with more or fewer values, a quote
    that does not close, bytes that are not UTF-8."""
    content, offsets = RowBytes(path), array("q")
    with report_broken_text(path, content) as file:
        start, text = file.tell(), io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            lines = CountedLines(text, start)
            columns = index_csv_lines(path, lines, delimiter, offsets)
        finally:
            text.detach()
    kind = TsvTable if delimiter == TsvTable.delimiter else CsvTable
    return kind(path, columns, content, offsets)


def index_csv_lines(
    path: Path, lines: CountedLines, delimiter: str, offsets: "array[int]"
) -> tuple[str, ...]:
    """Adds the offset of each row, and of the end. Returns the columns."""
    reader, columns = csv_reader(lines, delimiter), None
    while True:
        start, line = lines.offset, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: {error}",
                "a cell that begins with a quote must end with one; a quote inside it is doubled",
            ) from error
        if columns is None:
            columns = tuple(cells or ())
            if not columns:
                raise DataError(f"{path} has no header", "expected: column names on the first line")
            check_columns(path, columns)
        elif cells is None:
            offsets.append(start)
            return columns
        elif cells and len(cells) != len(columns):
            raise DataError(
                f"{path}, line {line}: a row of {len(cells)} values",
                f"expected: {len(columns)}, as the header has; found: {shown(cells)}",
                "quote cells that hold the delimiter or a line end",
            )
        elif cells:  # csv.DictReader, too, skips empty lines
            offsets.append(start)


def index_json_lines(path: Path) -> JsonLinesTable:
    """Raises DataError for a line that is no JSON object, with its number."""
    content, offsets, names = RowBytes(path), array("q"), dict[str, None]()
    with report_broken_text(path, content) as file:
        start, number = file.tell(), 0
        while text := file.readline(MAX_BYTES + 1):
            number += 1
            if text.strip():
                names |= dict.fromkeys(parse_object(path, number, text))
                offsets.append(start)
            start += len(text)
        offsets.append(start)
    return JsonLinesTable(path, tuple(names), content, offsets)


def parse_object(path: Path, number: int, text: bytes) -> dict[str, Any]:  # Any: JSON values
    expected = 'expected: one JSON object a line, like {"text": "good", "label": 1}'
    try:
        row = parse_json(text, finite=False)
    except ValueError as error:
        raise DataError(
            f"{path}, line {number} is not JSON: {error}", f"found: {shown(text)}", expected
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} is no object", f"found: {shown(row)}", expected)
    return row
