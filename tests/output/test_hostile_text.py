"""Texts from the data: every reader of csv gets them back, and none acts on a terminal or runs in a spreadsheet."""

import csv
import io
import json

import pytest

from influence_cli.errors import UsageProblem
from influence_cli.output.columns import SCORE_COLUMNS, SELF_COLUMNS
from influence_cli.output.tables import TableWriter
from influence_cli.output.trace_plot import print_trace
from influence_cli.output.visible import escape_controls

HOSTILE = {
    "an escape sequence": "\x1b]0;title\x07\x1b[31mred",
    "an 8-bit escape sequence": "\x9b31mred",
    "a backspace": "good\b\b\b\bevil",
    "a bidi override": "\u202egnp.exe\u202c",
    "an isolate": "\u2066text\u2069",
    "a tag": "a\U000e0041b",
    "a lone surrogate": "a\ud800b",
    "a zero byte": "a\0b",
}
ACTING = {"\x1b", "\x07", "\x9b", "\b", "\0", "\u202e", "\u202c", "\u2066", "\u2069", "\ud800", "\U000e0041"}  # fmt: skip


def written(format: str, text: str, **settings) -> str:
    out = io.StringIO()
    writer = TableWriter(format, None, out, **settings)
    writer.write(iter([(0, "proponent", 1, 7, 0.5, text, text, "", text)]), SCORE_COLUMNS)
    return out.getvalue()


@pytest.mark.parametrize("what", HOSTILE)
def test_no_text_acts_on_a_terminal(what):
    shown = written("table", HOSTILE[what])
    assert not ACTING & set(shown)
    assert "\\x" in shown or "\\u" in shown.lower()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("what", HOSTILE)
def test_a_terminal_gets_no_acting_text_in_any_format_and_a_pipe_every_character(format, what):
    row = (0, "proponent", 1, 7, 0.5, HOSTILE[what], "a\nb", "", "")
    out, pipe = Terminal(), io.StringIO()
    TableWriter(format, None, out).write(iter([row]), SCORE_COLUMNS)
    assert not ACTING & set(out.getvalue())
    TableWriter(format, None, pipe).write(iter([row]), SCORE_COLUMNS)
    if format != "jsonl":
        assert HOSTILE[what] in pipe.getvalue()
        assert '"a\nb"' in out.getvalue()
    elif what != "a lone surrogate":
        assert json.loads(pipe.getvalue())["query_label"] == HOSTILE[what]


def test_no_title_of_a_plot_acts_on_a_terminal():
    out = io.StringIO()
    print_trace("query 1 (\x1b[31m)", [(1, 1.0)], range(1, 3), out)
    assert "\x1b" not in out.getvalue()
    assert "\\x1b[31m" in out.getvalue()


def test_markup_is_text():
    assert "[bold]loud[/bold] [link=x]" in written("table", "[bold]loud[/bold] [link=x]")


def test_ordinary_text_stays_as_it_is():
    for text in ("naïve café", "日本語", "a\u0301", "😀", "[x]", "a\\b"):
        assert escape_controls(text) == text


@pytest.mark.parametrize("format", ["csv", "tsv"])
@pytest.mark.parametrize("text", ["a\rb", "\r", "a\r\nb", "a\nb", "\r\n", 'a"\rb', "a\tb,c"])
def test_line_ends_in_a_text_come_back(format, text):
    content = written(format, text)
    assert content.endswith("\n")
    assert not content.endswith("\r\n")
    rows = list(
        csv.reader(io.StringIO(content, newline=""), delimiter="," if format == "csv" else "\t")
    )
    assert len(rows) == 2
    assert rows[1][5] == rows[1][8] == text
    assert [line.strip('"') for line in content.splitlines() if line == "\r"] == []
    quoted = content.split("\n", 1)[1]
    assert '"' in quoted  # readers that end a line at a lone \r, such as pandas' C parser


def test_a_lone_surrogate_is_written_as_its_number(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    row = (1, 7, 0.5, 0.1, "a\ud800b", "é")
    for name in ("x.csv", "x.tsv", "x.jsonl", "x.parquet"):
        TableWriter.open(None, tmp_path / name).write(iter([row]), SELF_COLUMNS)
    assert "a\\ud800b" in (tmp_path / "x.csv").read_text(encoding="utf-8")
    assert "a\\ud800b" in (tmp_path / "x.tsv").read_text(encoding="utf-8")
    row = json.loads((tmp_path / "x.jsonl").read_text(encoding="utf-8"))
    assert (row["train_label"], row["train_text"]) == ("a\\ud800b", "é")
    assert pq.read_table(tmp_path / "x.parquet").to_pylist()[0]["train_label"] == "a\\ud800b"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
@pytest.mark.parametrize("format", ["csv", "tsv"])
def test_safe_cells_prefix_what_a_spreadsheet_runs(format, start):
    text = f"{start}cmd|' /C calc'!A0"
    for safe, expected in ((False, text), (True, f"'{text}")):
        content = written(format, text, safe_cells=safe)
        reader = csv.reader(io.StringIO(content, newline=""), delimiter="," if format == "csv" else "\t")  # fmt: skip
        assert list(reader)[1] == ["0", "proponent", "1", "7", "0.5", expected, expected, "", expected]  # fmt: skip


def test_safe_cells_leave_numbers_alone():
    out = io.StringIO()
    writer = TableWriter("csv", None, out, safe_cells=True)
    writer.write(iter([(0, "opponent", 1, 7, -0.5, "", "", "", "")]), SCORE_COLUMNS)
    assert "0,opponent,1,7,-0.5,,,," in out.getvalue()


def test_safe_cells_are_refused_for_other_formats(tmp_path):
    with pytest.raises(UsageProblem, match="--safe-cells"):
        TableWriter.open(None, tmp_path / "x.jsonl", safe_cells=True)
