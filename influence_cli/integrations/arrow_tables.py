"""Tables in the formats of Arrow: Parquet, files and streams, folders of save_to_disk."""

import threading
from abc import abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from influence_cli.errors import DataError
from influence_cli.integrations.tables import Table, check_columns, missing_package

PIECES = 2  # row groups or record batches of a table in memory
LONGEST_REASON = 200  # characters of pyarrow's message


class PiecewiseTable(Table):
    """A table in pieces of `sizes` rows, of which it keeps the last PIECES in memory."""

    def __init__(self, path: Path, columns: tuple[str, ...], sizes: list[int]) -> None:
        super().__init__(path, columns)
        self._starts = [0, *accumulate(sizes)]
        self._forget()

    def _forget(self) -> None:
        self._lock, self._source = threading.Lock(), None
        self._pieces: OrderedDict[int, Any] = OrderedDict()  # Any: pyarrow has no types

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        own = ("_lock", "_source", "_pieces")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:  # Any: attributes
        self.__dict__.update(state)
        self._forget()

    def __len__(self) -> int:
        return self._starts[-1]

    _source: Any  # pyarrow's reader, opened at the first read

    @abstractmethod
    def _open(self) -> Any: ...  # Any: pyarrow's reader

    @abstractmethod
    def _read_piece(self, number: int) -> Any: ...  # Any: rows with slice() and to_pylist()

    def _row(self, index: int) -> dict[str, Any]:
        import pyarrow as pa

        number = bisect_right(self._starts, index) - 1
        try:
            with self._lock:
                if self._source is None:
                    self._source = self._open()
                if number not in self._pieces:
                    self._pieces[number] = self._read_piece(number)
                self._pieces.move_to_end(number)
                while len(self._pieces) > PIECES:
                    self._pieces.popitem(last=False)
                piece = self._pieces[number]
            return piece.slice(index - self._starts[number], 1).to_pylist()[0]
        except (pa.ArrowException, OSError) as error:
            raise broken_file(self.path, error, f", row {index}") from error


class ParquetTable(PiecewiseTable):
    """Pieces: row groups."""

    def _open(self) -> Any:  # Any: pyarrow's reader
        return open_parquet_file(self.path)

    def _read_piece(self, number: int) -> Any:  # Any: a pyarrow table
        return self._source.read_row_group(number, use_threads=False)


class ArrowTable(PiecewiseTable):
    """Pieces: record batches, which are memory-mapped where they are not compressed."""

    def _open(self) -> Any:  # Any: pyarrow's reader
        return open_batches(self.path)

    def _read_piece(self, number: int) -> Any:  # Any: a record batch
        source = self._source
        return source[number] if isinstance(source, list) else source.get_batch(number)


class SavedDataset(Table):
    """A folder of datasets' save_to_disk. Images and sounds come as datasets decodes them."""

    def __init__(self, path: Path) -> None:
        self._lock, self._dataset = threading.Lock(), load_saved_dataset(path)
        super().__init__(path, tuple(self._dataset.column_names))

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return SavedDataset, (self.path,)

    def __len__(self) -> int:
        return len(self._dataset)

    def _row(self, index: int) -> dict[str, Any]:
        with self._lock:
            return self._dataset[index]


def broken_file(path: Path, error: Exception, place: str = "") -> DataError:
    reason = str(error)[:LONGEST_REASON]
    return DataError(f"{path}{place} can't be read: {reason}", "write or copy the file again")


def open_parquet_file(path: Path) -> Any:  # Any: pyarrow has no types
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, page_checksum_verification=True)


def open_parquet(path: Path) -> ParquetTable:
    """Raises DataError: pyarrow is not installed, or the file is broken."""
    try:
        import pyarrow as pa
    except ImportError:
        raise missing_package(path, "pyarrow", "parquet") from None
    try:
        with open_parquet_file(path) as file:
            columns = tuple(file.schema_arrow.names)
            groups = range(file.metadata.num_row_groups)
            sizes = [file.metadata.row_group(number).num_rows for number in groups]
    except (pa.ArrowException, OSError) as error:
        raise broken_file(path, error) from error
    check_columns(path, columns)
    return ParquetTable(path, columns, sizes)


def open_batches(path: Path) -> Any:  # Any: a reader with get_batch(), or a stream's batches
    import pyarrow as pa

    source = pa.memory_map(str(path))
    try:
        return pa.ipc.open_file(source)
    except pa.ArrowInvalid:
        source.seek(0)
        return list(pa.ipc.open_stream(source))  # of views into the file, if not compressed


def open_arrow(path: Path) -> ArrowTable:
    """A file or a stream of record batches. Raises DataError as open_parquet."""
    try:
        import pyarrow as pa
    except ImportError:
        raise missing_package(path, "pyarrow", "parquet") from None
    try:
        batches = open_batches(path)
        if not isinstance(batches, list):
            batches = [batches.get_batch(number) for number in range(batches.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise broken_file(path, error) from error
    columns = tuple(batches[0].schema.names) if batches else ()
    check_columns(path, columns)
    return ArrowTable(path, columns, [batch.num_rows for batch in batches])


def load_saved_dataset(path: Path) -> Any:  # Any: datasets has no types
    try:
        import datasets
    except ImportError:
        raise missing_package(path, "datasets", "hf") from None
    try:
        return datasets.load_from_disk(str(path)).with_format(None)
    except Exception as error:  # datasets raises many kinds for a broken folder
        raise broken_file(path, error) from error


def open_saved_dataset(path: Path) -> SavedDataset:
    """Raises DataError: datasets is not installed, or the folder is broken."""
    return SavedDataset(path)
