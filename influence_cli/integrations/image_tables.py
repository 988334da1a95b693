"""Pictures as tables: folders CLASS/*.png, and the arrays of an npz file."""

from pathlib import Path
from typing import Any

import numpy as np

from influence_cli.errors import DataError, listed
from influence_cli.integrations.tables import Table

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageFolder(Table):
    """The pictures of a folder with one folder per class. Columns: `image`, the file's path;
    `label`, the class; `id`, the path within the folder. Ordered by class and name.
    """

    def __init__(self, path: Path, files: list[Path]) -> None:
        super().__init__(path, ("image", "label", "id"))
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def _row(self, index: int) -> dict[str, Any]:  # Any: texts
        file = self.files[index]
        id = file.relative_to(self.path).as_posix()
        return {"image": str(file), "label": file.parent.name, "id": id}


class ArrayTable(Table):
    """The arrays of an npz file, row by row. Arrays stay in the memory of the process."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]) -> None:
        super().__init__(path, tuple(arrays))
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def _row(self, index: int) -> dict[str, Any]:  # Any: arrays and numbers
        rows = {name: array[index] for name, array in self.arrays.items()}
        return {name: row if row.ndim else row.item() for name, row in rows.items()}


def find_images(path: Path) -> list[Path]:
    """The pictures in the folders of a folder, by class and name."""
    return sorted(
        file
        for folder in path.iterdir()
        if folder.is_dir() and not folder.name.startswith(".")
        for file in folder.iterdir()
        if file.suffix.lower() in ENDINGS
    )


def list_splits(path: Path) -> list[str]:
    """The splits of an npz file: `train` of the arrays x_train and y_train."""
    with np.load(path) as file:
        endings = {name.rpartition("_")[2] for name in file.files if "_" in name}
    return [split for split in ("train", "val", "valid", "test") if split in endings]


def open_arrays(path: Path, split: str | None) -> ArrayTable:
    """Raises DataError for a file that is no npz file, arrays of different lengths, and an unknown
    split.
    """
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} can't be read: {error}", "expected: an npz file without pickled objects"
        ) from error
    if split is not None:
        ending = f"_{split}"
        arrays = {
            name.removesuffix(ending): array
            for name, array in arrays.items()
            if name.endswith(ending)
        }
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not arrays or len(set(lengths.values())) > 1:
        splits = list_splits(path)
        raise DataError(
            f"{path} has no array of the split {split}"
            if not arrays
            else f"{path} has arrays of different lengths",
            f"found: {listed([f'{name} ({length:,})' for name, length in lengths.items()])}",
            f"table(path, split=...) takes one of: {', '.join(splits)}"
            if splits
            else "expected: arrays with one row per example",
        )
    return ArrayTable(path, arrays)
