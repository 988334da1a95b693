"""Tables on disk as map-style datasets: the number of a row -> column -> value.

A table holds an index or a footer in memory, not the rows: it reads a row when it is needed. It can
be pickled and read by several threads.
"""

import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, SupportsIndex

from influence_cli.errors import DataError, listed
from influence_cli.storage.json_text import read_json_file

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
ARROW = (".arrow", ".feather", ".ipc")
EXPECTED = (
    "expected: .csv, .tsv, .jsonl or .json (one object a line), each also with .gz; .parquet; "
    ".arrow, .feather or .ipc; .npz; a folder of datasets' save_to_disk, or of CLASS/*.png"
)


class Table(ABC):
    """The rows of a table on disk. `columns`: of JSON lines those that any row has."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self.path, self.columns = path, columns

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _row(self, index: int) -> dict[str, Any]:
        """Row `index`, which exists. Any: what the file holds."""

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:  # Any: what the file holds
        """A row as column -> value; csv and tsv hold texts. Raises IndexError for a row that does
        not exist, DataError for one that can't be read."""
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {self.path}: it has the rows 0 to {len(self) - 1}")
        return self._row(number)


def table(path: str | Path, split: str | None = None) -> Table:
    """The table in a file or folder, by its ending. `split`: of an npz file with arrays like
    x_train and y_train.

    Raises DataError: no such file, an unknown kind, a file that is broken, empty or without column
    names, or a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"no table at {path}", EXPECTED)
    if path.suffix.lower() == ".npz":
        from influence_cli.integrations.image_tables import open_arrays

        opened: Table = open_arrays(path, split)
    elif split is not None:
        raise DataError(f"{path}: split={split!r}", "expected: a split of an .npz file")
    else:
        opened = open_folder(path) if path.is_dir() else open_file(path)
    if not len(opened):
        raise DataError(f"{path} has no rows", "expected: at least one")
    return opened


def open_file(path: Path) -> Table:
    zipped = path.suffix.lower() == ".gz"
    suffix = Path(path.stem).suffix.lower() if zipped else path.suffix.lower()
    if suffix in DELIMITERS or suffix in JSON_LINES:
        from influence_cli.integrations.text_tables import index_csv, index_json_lines

        if suffix in DELIMITERS:
            return index_csv(path, DELIMITERS[suffix])
        return index_json_lines(path)
    if not zipped and suffix in (".parquet", *ARROW):
        from influence_cli.integrations.arrow_tables import open_arrow, open_parquet

        return open_parquet(path) if suffix == ".parquet" else open_arrow(path)
    ending = "".join(path.suffixes[-2:] if zipped else path.suffixes[-1:])
    raise DataError(
        f"{path} is no table that influence can read",
        f"found: {f'the ending {ending}' if ending else 'a name without an ending'}",
        EXPECTED,
    )


def open_folder(path: Path) -> Table:
    """A folder that save_to_disk wrote."""
    splits = path / "dataset_dict.json"
    if splits.is_file():
        names = read_json_file(splits).get("splits", [])
        raise DataError(
            f"{path} holds {len(names)} splits, and a table is one of them",
            f"found: {listed(names)}",
            *(f"give {path / name}" for name in names[:1]),
        )
    if not (path / "state.json").is_file():
        from influence_cli.integrations.image_tables import ImageFolder, find_images

        if images := find_images(path):
            return ImageFolder(path, images)
        raise DataError(
            f"{path} is a folder, and holds no data set",
            "found: no state.json of datasets' save_to_disk, and no pictures CLASS/*.png",
            "give a file, a folder of save_to_disk, or a folder with a folder per class",
        )
    from influence_cli.integrations.arrow_tables import open_saved_dataset

    return open_saved_dataset(path)


def missing_package(path: Path, package: str, extra: str) -> DataError:
    return DataError(
        f"{path} can't be read without {package}",
        f"install it: pip install 'influence-cli[{extra}]'",
    )


def check_columns(path: Path, columns: tuple[str, ...]) -> None:
    """Raises DataError for a column name that comes twice."""
    repeated = [name for at, name in enumerate(columns) if name in columns[:at]]
    if repeated:
        raise DataError(
            f"{path} has two columns with the name {repeated[0][:80]!r}",
            "expected: column names that differ, and in a text file a first line of column names",
        )
