"""Every format through the same rows."""

import csv
import io
import json

import pytest

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.evaluate.declaration import COLUMNS
from influence_cli.output.columns import SCORE_COLUMNS, score_columns
from influence_cli.output.tables import TableWriter
from influence_cli.output.terminal import word_shares, word_style

ROWS = [
    (0, "proponent", 1, 7, 0.1 + 0.2, "a", "b,c", 'say "hi"', "two\nlines"),
    (0, "opponent", 1, 3, -1e-12, "a", "", "ü", ""),
]


def text(format: str, rows=ROWS) -> str:
    out = io.StringIO()
    TableWriter(format, None, out).write(iter(rows), SCORE_COLUMNS)
    return out.getvalue()


@pytest.mark.parametrize(("format", "delimiter"), [("csv", ","), ("tsv", "\t")])
def test_delimited_text_keeps_every_digit_and_every_character(format, delimiter):
    content = text(format)
    assert "\r" not in content
    head, *rows = csv.reader(io.StringIO(content), delimiter=delimiter)
    assert tuple(head) == SCORE_COLUMNS
    assert [
        [type(value)(cell) for value, cell in zip(row, cells, strict=True)]
        for row, cells in zip(ROWS, rows, strict=True)
    ] == [list(row) for row in ROWS]


def test_jsonl_keeps_numbers_as_numbers():
    rows = [json.loads(line) for line in text("jsonl").splitlines()]
    assert [tuple(row.values()) for row in rows] == ROWS
    assert tuple(rows[0]) == SCORE_COLUMNS


@pytest.mark.parametrize("rows", [ROWS, []])
def test_parquet_has_typed_columns(tmp_path, rows):
    pq = pytest.importorskip("pyarrow.parquet")
    TableWriter.open(None, tmp_path / "x.parquet").write(iter(rows), SCORE_COLUMNS)
    table = pq.read_table(tmp_path / "x.parquet")
    assert [tuple(row.values()) for row in table.to_pylist()] == rows
    assert str(table.schema.field("score").type) == "double"
    assert str(table.schema.field("train").type) == "int64"


def test_terminal_table_leaves_out_empty_columns_and_keeps_one_line_a_row():
    shown = text("table", [(*row[:6], "", "", "") for row in ROWS])
    assert "train_text" not in shown
    assert "query_label" in shown
    assert len(shown.strip().splitlines()) == 3


def test_an_output_file_is_whole_or_not_there(tmp_path):
    def broken():
        yield ROWS[0]
        raise RuntimeError

    target = tmp_path / "out.csv"
    target.write_text("before")
    with pytest.raises(RuntimeError):
        TableWriter.open("csv", target).write(broken(), SCORE_COLUMNS)
    assert target.read_text() == "before"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(OutputError, match="can't be written"):
        TableWriter("csv", tmp_path / "no" / "out.csv", io.StringIO()).write(
            iter(ROWS), SCORE_COLUMNS
        )


def test_the_format_follows_flag_then_file_then_terminal(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for asked, output, stdout, expected in [
        (None, tmp_path / "x.jsonl", Terminal(), "jsonl"),
        (None, tmp_path / "x.txt", Terminal(), "csv"),
        (None, None, Terminal(), "table"),
        (None, None, io.StringIO(), "csv"),
        ("tsv", tmp_path / "x.jsonl", io.StringIO(), "tsv"),
    ]:
        assert TableWriter.open(asked, output, stdout).format == expected
    with pytest.raises(UsageProblem, match="unknown"):
        TableWriter.open("xml", None)
    with pytest.raises(UsageProblem, match="binary"):
        TableWriter.open("parquet", None, Terminal())


@pytest.mark.parametrize("by", ["word", "token", "query-token"])
def test_words_are_coloured_by_their_share_of_the_pair(by, monkeypatch):
    columns = score_columns(by)
    rows = [
        (0, "proponent", 1, 7, "good", 3.0, "", "", "", ""),
        (0, "proponent", 1, 7, "film", -0.9, "", "", "", ""),
        (0, "proponent", 1, 7, "the", 0.1, "", "", "", ""),
        (0, "proponent", 2, 8, "film", 0.0, "", "", "", ""),
    ]
    shares = word_shares(rows, columns)
    assert shares == [0.75, -0.225, 0.025, 0.0]
    assert [word_style(share) for share in shares] == ["bold green", "red", "dim green", "dim"]
    assert word_shares(rows, SCORE_COLUMNS) == []

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen, pipe = Terminal(), io.StringIO()
    for file in (screen, pipe):
        TableWriter("table", None, file).write(rows, columns)
    for style, word in (("1;32", "good"), ("31", "film"), ("2;32", "the"), ("2", "film")):
        assert f"\x1b[{style}m{word}" in screen.getvalue()
    assert "\x1b" not in pipe.getvalue()


FIGURES = [("dve", "lds", "spearman", 0.5, 0.25, None, 30, "42 trainings, 3.0 s")]


def test_a_table_of_figures_is_typed_and_leaves_absent_numbers_empty(tmp_path):
    out = io.StringIO()
    TableWriter("table", None, out).write(FIGURES, COLUMNS)
    assert out.getvalue().split()[-8:] == [
        "spearman",
        "0.5",
        "0.25",
        "30",
        "42",
        "trainings,",
        "3.0",
        "s",
    ]
    out = io.StringIO()
    TableWriter("csv", None, out).write(FIGURES, COLUMNS)
    assert out.getvalue().splitlines()[1] == 'dve,lds,spearman,0.5,0.25,,30,"42 trainings, 3.0 s"'
    pq = pytest.importorskip("pyarrow.parquet")
    TableWriter("parquet", tmp_path / "f.parquet", io.StringIO()).write(FIGURES, COLUMNS)
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "f.parquet")}
    assert [types[name] for name in COLUMNS] == ["string"] * 3 + ["double"] * 3 + [
        "int64",
        "string",
    ]
