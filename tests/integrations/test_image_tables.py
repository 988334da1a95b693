"""Pictures and arrays as tables."""

import numpy as np
import pytest
from PIL import Image

from influence_cli.data import table
from influence_cli.errors import DataError


def test_a_folder_per_class_is_a_table_of_pictures(tmp_path):
    for name, number in (("b", 2), ("a", 1)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new("RGB", (2, 2)).save(tmp_path / name / f"{i}.PNG")
    (tmp_path / "a/notes.txt").write_text("no picture")
    (tmp_path / ".hidden").mkdir()
    rows = table(tmp_path)
    assert rows.columns == ("image", "label", "id")
    assert [(row["label"], row["id"]) for row in (rows[i] for i in range(len(rows)))] == [
        ("a", "a/0.PNG"),
        ("b", "b/0.PNG"),
        ("b", "b/1.PNG"),
    ]
    with pytest.raises(IndexError):
        rows[3]


def test_arrays_of_an_npz_file_are_columns(tmp_path):
    images, labels = np.arange(24, dtype=np.uint8).reshape(3, 2, 4), np.array([2, 0, 1])
    np.savez(
        tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:2], y_test=labels[:2]
    )
    rows = table(tmp_path / "d.npz", split="train")
    assert len(rows) == 3 and rows.columns == ("x", "y")
    assert np.array_equal(rows[1]["x"], images[1]) and rows[1]["y"] == 0
    assert isinstance(rows[1]["y"], int)
    assert len(table(tmp_path / "d.npz", split="test")) == 2


def test_an_npz_file_names_its_splits_and_refuses_others(tmp_path):
    np.savez(tmp_path / "d.npz", x_train=np.zeros(3), x_test=np.zeros(2))
    with pytest.raises(
        DataError, match=r"different lengths\n.*x_train \(3\), x_test \(2\)\n.*train, test"
    ):
        table(tmp_path / "d.npz")
    with pytest.raises(DataError, match="no array of the split dev"):
        table(tmp_path / "d.npz", split="dev")
    (tmp_path / "csv.csv").write_text("a\n1\n")
    with pytest.raises(DataError, match="a split of an"):
        table(tmp_path / "csv.csv", split="train")


def test_an_npz_file_of_pickled_objects_or_none_is_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="without pickled objects"):
        table(tmp_path / "d.npz")
    (tmp_path / "e.npz").write_bytes(b"not a zip file")
    with pytest.raises(DataError, match="can't be read"):
        table(tmp_path / "e.npz")
