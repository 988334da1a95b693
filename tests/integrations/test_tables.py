"""Tables on disk as datasets: the same rows as their own readers give, and a message for each broken file."""

import csv
import gzip
import json
import pickle
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influence_cli.data import Table, table
from influence_cli.errors import DataError

untroubled = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
CELLS = st.text(
    alphabet=st.one_of(
        st.sampled_from(list("\",;\t\r\n 'aé\U0001f600\u2028\ufeff\x0b\x1c\x00")),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=8,
)


def rows_of(opened: Table) -> list[dict]:
    return [opened[number] for number in range(len(opened))]


def write_csv(path: Path, rows: list[list[str]], delimiter: str, end: str, mark: str) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(mark)
        csv.writer(file, delimiter=delimiter, lineterminator=end).writerows(rows)


@untroubled
@given(
    rows=st.lists(st.lists(CELLS, min_size=2, max_size=2), min_size=1, max_size=6),
    kind=st.sampled_from([("csv", ","), ("tsv", "\t")]),
    end=st.sampled_from(["\r\n", "\r\n\r\n"]),  # csv quotes a cell with \r or \n only so
    mark=st.sampled_from(["", "\ufeff"]),
)
def test_a_csv_is_what_dictreader_reads(tmp_path, rows, kind, end, mark):
    suffix, delimiter = kind
    path = tmp_path / f"table.{suffix}"
    write_csv(path, [["text", "läbel"], *rows], delimiter, end, mark)
    with path.open(encoding="utf-8-sig", newline="") as file:
        expected = list(csv.DictReader(file, delimiter=delimiter))
    assert [list(row.values()) for row in expected] == rows
    opened = table(path)
    assert opened.columns == ("text", "läbel")
    assert rows_of(opened) == expected
    assert opened[len(expected) - 1] == expected[-1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_in_three_ways(tmp_path, end):
    path = tmp_path / "table.csv"
    path.write_bytes(end.join(["text,label", '"a\nb",é', "c,2"]).encode())
    assert rows_of(table(path)) == [{"text": "a\nb", "label": "é"}, {"text": "c", "label": "2"}]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**62), 2**62)
    | st.floats(allow_nan=False, allow_infinity=False)
    | CELLS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CELLS, inner, max_size=3),
    max_leaves=6,
)


@untroubled
@given(
    rows=st.lists(st.dictionaries(CELLS, JSON, max_size=3), min_size=1, max_size=6),
    escaped=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n\n"]),
    last=st.booleans(),
)
def test_json_lines_are_what_json_loads_reads(tmp_path, rows, escaped, end, last):
    path = tmp_path / "table.jsonl"
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    path.write_bytes((end.join(lines) + end * last).encode())
    opened = table(path)
    assert rows_of(opened) == [json.loads(line) for line in lines]
    assert opened.columns == tuple(dict.fromkeys(name for row in rows for name in row))


ROWS = [{"text": f"a text, {n}\nof two lines", "label": str(n % 3)} for n in range(25)]


def write_arrow(path: Path, new_writer: str) -> None:
    pa = pytest.importorskip("pyarrow")
    batch = pa.Table.from_pylist(ROWS)
    with getattr(pa.ipc, new_writer)(str(path), batch.schema) as writer:
        writer.write_table(batch, max_chunksize=10)


def write_table(folder: Path, kind: str) -> Path:
    path = folder / f"table.{kind}"
    cells = [["text", "label"], *([*row.values()] for row in ROWS)]
    if kind in ("csv", "tsv"):
        write_csv(path, cells, {"csv": ",", "tsv": "\t"}[kind], "\n", "")
    elif kind in ("jsonl", "json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif kind.endswith(".gz"):
        path.write_bytes(gzip.compress(write_table(folder, kind[:-3]).read_bytes()))
    elif kind == "parquet":
        pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=10)
    elif kind == "feather":
        write_arrow(path, "new_file")
    elif kind == "arrow":
        write_arrow(path, "new_stream")
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


KINDS = (
    "csv", "tsv", "jsonl", "json", "csv.gz", "tsv.gz", "jsonl.gz",
    "parquet", "feather", "arrow", "folder",
)  # fmt: skip


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tables")
    return {kind: write_table(folder, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_gives_the_same_rows_in_any_order(tables, kind):
    opened = table(str(tables[kind]))
    assert (opened.path, opened.columns, len(opened)) == (tables[kind], ("text", "label"), 25)
    assert [opened[number] for number in reversed(range(25))] == ROWS[::-1]
    assert list(opened) == ROWS  # an iteration ends at IndexError


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_table_and_threads_read_the_same_rows(tables, kind):
    opened = table(tables[kind])
    assert opened[3] == ROWS[3]
    copy = pickle.loads(pickle.dumps(opened))
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(copy.__getitem__, [*range(25)] * 4)) == ROWS * 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [-1, 25])
def test_a_row_that_does_not_exist_is_an_index_error(tables, kind, number):
    with pytest.raises(IndexError, match=f"row {number} of .*: it has the rows 0 to 24"):
        table(tables[kind])[number]


def test_a_table_of_texts_takes_a_few_bytes_of_memory_a_row(tmp_path):
    path = tmp_path / "large.csv"
    path.write_text("text\n" + f"{'x' * 500}\n" * 20_000)
    tracemalloc.start()
    opened = table(path)
    for number in range(0, 20_000, 100):
        assert len(opened[number]["text"]) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # of 10 MB


def test_parquet_keeps_two_row_groups(tables):
    opened = table(tables["parquet"])
    list(opened)
    assert sorted(opened._pieces) == [1, 2]  # type: ignore[attr-defined]  # of three


BROKEN = {
    "no file": (None, "no table at", "expected: .csv, .tsv"),
    "x.xlsx": ("", "is no table that influence can read", "found: the ending .xlsx"),
    "x": ("", "found: a name without an ending"),
    "empty.csv": ("", "has no header", "expected: column names on the first line"),
    "blank.csv": ("\ntext,label\n", "has no header"),
    "head.csv": ("text,label\n", "has no rows", "expected: at least one"),
    "twice.csv": ("text,text\na,b\n", "has two columns with the name 'text'"),
    "long.csv": ('text,label\n"a\nb",1\nc,2,3\n', "line 4: a row of 3 values", "expected: 2"),
    "short.tsv": ("text\tlabel\na\n", "line 2: a row of 1 values"),
    "quote.csv": ('text,label\na,1\n"b,2\nc,3\n', "line 3: unexpected end of data", "a quote"),
    "latin.csv": (b"text\ngood\ncaf\xe9\n", "line 3 is not UTF-8", "0xe9", "iconv -f latin1"),
    "latin.jsonl": (b'{"a": "caf\xe9"}\n', "line 1 is not JSON: it is no valid UTF-8"),
    "bad.jsonl": ('{"a": 1}\n\n{"a": \n', "line 3 is not JSON: Expecting value", "one JSON object"),
    "list.json": ('[{"a": 1}]\n', "line 1 is no object", "found: [{'a': 1}]"),
    "many.json": ('[\n{"a": 1}\n]\n', "line 1 is not JSON"),
    "key.jsonl": ('{"a": 1, "a": 2}\n', "line 1 is not JSON: an object has the key 'a' twice"),
    "empty.jsonl": ("", "has no rows"),
    "cut.csv.gz": (gzip.compress(b"text\na\n")[:-9], "can't be read"),
    "plain.csv.gz": ("text\na\n", "can't be read"),
    "bad.parquet": ("PAR1", "can't be read"),
    "bad.arrow": ("ARROW", "can't be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_has_its_own_message(name, tmp_path):
    content, *says = BROKEN[name]
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        table(tmp_path / name)
    for text in (*says, name):
        assert text in str(caught.value)


@untroubled
@given(
    content=st.binary(max_size=60)
    | st.text(alphabet='ab",\t\n\r{}[]:1\\ ', max_size=40).map(str.encode),
    suffix=st.sampled_from([".csv", ".tsv", ".jsonl", ".csv.gz", ".parquet", ".arrow"]),
)
def test_any_bytes_are_a_table_or_a_data_error(tmp_path, content, suffix):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(content)
    try:
        opened = table(path)
    except DataError:
        return
    for row in rows_of(opened):
        assert set(row) <= set(opened.columns)


def test_a_folder_of_several_splits_names_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    splits = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match=r"data holds 2 splits(.|\n)*found: train, test"):
        table(tmp_path / "data")
    assert table(tmp_path / "data" / "train")[2] == ROWS[2]
    with pytest.raises(DataError, match="holds no data set"):
        table(tmp_path)


@pytest.mark.parametrize(
    ("kind", "package", "extra"),
    [
        ("parquet", "pyarrow", "parquet"),
        ("arrow", "pyarrow", "parquet"),
        ("folder", "datasets", "hf"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(tables, kind, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=f"without {package}(.|\n)*influence-cli\\[{extra}\\]"):
        table(tables[kind])


def test_a_file_that_is_written_again_is_refused(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("text\na\nb\n")
    opened = table(path)
    assert opened[0] == {"text": "a"}
    path.write_text("text\nlonger\nb\n")
    for _ in range(2):
        with pytest.raises(DataError, match=r"table.csv changed while it was read"):
            opened[1]
        path.unlink(missing_ok=True)


def test_a_damaged_row_group_is_named_by_its_row(tables, tmp_path):
    content = bytearray(tables["parquet"].read_bytes())
    content[60] ^= 0xFF
    path = tmp_path / "table.parquet"
    path.write_bytes(content)
    opened = table(path)
    assert opened[24] == ROWS[24]
    with pytest.raises(DataError, match=r"table.parquet, row 0 can't be read"):
        opened[0]
