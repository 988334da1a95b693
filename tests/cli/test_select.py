"""influence select: ids by the scores of a table; what feeds the next command, and what is refused."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from influence_cli.output.tables import write_lines
from tests.refusals import refused
from tests.training import train

HEAD = "query,kind,rank,train,score,query_label,train_label,query_text,train_text\n"
# sums over both queries: 0 -> 3, 1 -> -1, 2 -> 3, 3 -> 0.5, 10 -> 4; labels a a b b b
SCORES = HEAD + (
    "0,proponent,1,0,2.0,a,a,,\n0,proponent,2,10,1.5,a,b,,\n0,proponent,3,3,0.5,a,b,,\n"
    "0,proponent,4,2,0.0,a,b,,\n0,opponent,1,1,-2.0,a,a,,\n"
    "1,proponent,1,2,3.0,b,b,,\n1,proponent,2,10,2.5,b,b,,\n1,proponent,3,0,1.0,b,a,,\n"
    "1,proponent,4,1,1.0,b,a,,\n1,proponent,5,3,0.0,b,b,,\n"
)


@pytest.fixture
def table(tmp_path) -> Path:
    (tmp_path / "scores.csv").write_text(SCORES)
    return tmp_path / "scores.csv"


@pytest.fixture
def select(influence):
    def call(*args, **options) -> list[str]:
        result = influence("select", *args, **options)
        assert result.code == 0, result.err
        assert result.out == "" or result.out.endswith("\n")
        return result.out.split()

    return call


RULES = {
    "--keep --top 1": "10",
    "--keep --top 2": "0 10",  # 0 and 2 have equal sums: the lower id
    "--keep --top 3": "0 2 10",
    "--drop --top 2": "1 2 3",
    "--keep --top 50%": "0 2 10",  # 2.5 examples: halves up
    "--keep --top 49.9%": "0 10",
    "--drop --top 9%": "0 1 2 3 10",  # 0.45 examples
    "--keep --top 100%": "0 1 2 3 10",
    "--drop --top 100%": "",
    "--keep --above 3": "10",
    "--drop --above 3": "0 1 2 3",
    "--keep --above -1": "0 2 3 10",
    "--keep --below 3": "1 3",
    "--keep --below 0": "1",
    "--drop --below -0.5": "0 2 3 10",
    "--keep --top 1 --per-class": "0 10",
    "--drop --top 1 --per-class": "1 2 3",
    "--keep --top 50% --per-class": "0 2 10",  # one of 2, two of 3
}


@pytest.mark.parametrize("flags", RULES)
def test_rules_select_by_the_sum_over_queries(flags, table, select):
    assert select(table, *flags.split()) == RULES[flags].split()


@pytest.mark.parametrize("suffix", ["tsv", "jsonl", "parquet"])
def test_other_formats_select_the_same(suffix, table, tmp_path, influence, select):
    other = tmp_path / f"scores.{suffix}"
    assert influence("merge", table, "-o", other, "--top", "all", "--quiet").code == 0
    assert select(other, "--keep", "--top", "2") == ["0", "10"]


def test_a_table_comes_from_a_pipe(select):
    assert select("-", "--keep", "--above", "3", stdin=SCORES) == ["10"]


def test_a_terminal_gets_no_character_that_acts_on_it(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "__stdout__", Terminal())
    write_lines(["a\x1b[2J", "b"], None)
    assert sys.__stdout__.getvalue() == "a\\x1b[2J\nb\n"


def test_parts_of_a_pair_are_added(table, tmp_path, select):
    lines = SCORES.replace("train,score", "train,layer,score", 1).splitlines()
    parts = [lines[0]]
    for line in lines[1:]:
        cells = line.split(",")
        for layer, part in (("0", 5.0), ("2", float(cells[4]) - 5.0)):
            parts.append(",".join([*cells[:4], layer, str(part), *cells[5:]]))
    table.write_text("\n".join(parts) + "\n")
    assert select(table, "--keep", "--top", "2") == ["0", "10"]


def test_a_table_of_self_has_no_queries(tmp_path, select):
    table = tmp_path / "self.csv"
    table.write_text("rank,train,score,loss,train_label,train_text\n1,7,2.0,1,a,\n2,3,1.0,9,b,\n")
    assert select(table, "--drop", "--top", "1") == ["3"]


def test_names_of_groups_are_ids(tmp_path, select):
    table = tmp_path / "groups.csv"
    table.write_text("query,train,score\n0,news,1\n0,sports,2\n0,10,3\n0,9,3\n")
    assert select(table, "--keep", "--above", "0") == ["9", "10", "news", "sports"]


def test_notes_say_how_many_and_what_the_table_lacks(table, influence):
    result = influence("select", table, "--keep", "--top", "2")
    assert result.err == f"note: 2 of the 5 examples in {table}\n"
    table.write_text("".join(SCORES.splitlines(keepends=True)[:-2]))
    result = influence("select", table, "--drop", "--top", "9")
    assert (
        f"note: {table} lacks 2 pairs of its queries and examples, which count as 0." in result.err
    )
    assert f"note: {table} has fewer than 9 examples, and --top 9 names all" in result.err
    assert f"note: 0 of the 5 examples in {table}" in result.err
    assert influence("select", table, "--drop", "--top", "9", "--quiet").err == ""
    result = influence("select", table, "--drop", "--top", "3", "--per-class")
    assert "note: 1 class has fewer than 3 examples, and --top 3 names all" in result.err


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_of_the_first_rows_is_noted(suffix, make_run, tmp_path, influence):
    table = tmp_path / f"self.{suffix}"
    assert influence("self", make_run(), "--top", "4", "-o", table).code == 0
    result = influence("select", table, "--drop", "--top", "1")
    assert len(result.out.split()) == 3
    assert f"note: {table} was written with --top 4: the ids are of the examples" in result.err


def test_a_changed_table_is_refused(make_run, tmp_path, influence):
    table = tmp_path / "self.csv"
    assert influence("self", make_run(), "-o", table).code == 0
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    refused(influence("select", table, "--keep", "--top", "1"), 1, "it is cut short or was changed")


# ---------------------------------------------------------------- what reads the ids
def test_ids_feed_train(make_run, tmp_path, influence):
    run, ids = make_run(), tmp_path / "ids.txt"
    table = influence("self", run, "--top", "all").out
    result = influence("select", "-", "--drop", "--top", "25%", "-o", ids, stdin=table)
    assert result.out == ""
    expected = set(ids.read_text().split())
    assert len(expected) == 15
    rows = influence("score", run, "--train", f"@{ids}", "--top", "all", "--queries", "0").rows
    assert {row["train"] for row in rows} == expected
    piped = influence("select", "-", "--drop", "--top", "25%", stdin=table).out
    rows = influence("score", run, "--train", "-", "--top", "all", stdin=piped).rows
    assert {row["train"] for row in rows} == expected


def test_ids_feed_mislabel(tmp_path, influence):
    run, ids = train(tmp_path / "run", every=6, rate=0.5), tmp_path / "wrong.txt"
    flags = ("--lr", "0.3")
    table = influence("self", run, "--top", "all", *flags).out
    result = influence("select", "-", "--keep", "--top", "3", "-o", ids, stdin=table)
    assert result.code == 0
    result = influence("evaluate", run, "mislabel", "--wrong", ids, *flags)
    assert result.code == 0, result.err
    figures = {(row["method"], row["figure"]): row["value"] for row in result.rows}
    assert figures["tracin", "auc"] == "1.0"  # the highest scores themselves


def test_select_opens_no_run_and_needs_no_torch(table):
    code = (
        f"import sys; sys.argv = ['influence', 'select', {str(table)!r}, '--keep', '--top', '1']\n"
        "from influence_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["10", "False"]


def test_a_full_disk_is_an_error(table):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, "-m", "influence_cli", "select", table, "--keep", "--top", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1
    assert "error: stdout can't be written: the disk is full" in ended.stderr


# ---------------------------------------------------------------- refusals
BAD_FLAGS = {
    "--top 1": ("neither --keep nor --drop", "expected: one of --keep and --drop"),
    "--keep --drop --top 1": ("--keep and --drop exclude each other",),
    "--keep": ("no rule that names examples", "one of --top, --above and --below"),
    "--keep --top 1 --above 2": ("--top and --above exclude each other",),
    "--keep --above 1 --below 2": ("--above and --below exclude each other",),
    "--keep --above 1 --per-class": ("--per-class does not apply to --above", "--top"),
    "--keep --top 0": ("--top 0", "a number from 1, or a percentage up to 100%, such as 5%"),
    "--keep --top all": ("--top all", "a number from 1"),
    "--keep --top 0%": ("--top 0%", "a percentage"),
    "--keep --top 101%": ("--top 101%", "a percentage"),
    "--keep --top -1%": ("--top -1%", "a percentage"),
    "--keep --top 1e1%": ("--top 1e1%", "a percentage"),
    "--keep --top \u00b2": ("--top \u00b2", "a number from 1"),
    "--keep --above nan": ("--above nan", "expected: a number"),
    "--keep --below inf": ("--below inf", "expected: a number"),
    "--keep --top 1 -o none/ids.txt": ("-o none/ids.txt: its folder does not exist",),
}


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags_are_refused_by_name(flags, table, influence):
    refused(influence("select", table, *flags.split()), 2, *BAD_FLAGS[flags])


BAD_TABLES = {
    "another table": ("method,figure\na,b\n", "is not a table of score or self", "method, figure"),
    "no rows": (HEAD, "has no rows"),
    "an empty file": ("", "can't be read: the file is empty"),
    "a word as a score": ("query,train,score\n0,1,x\n", "line 2: score is 'x', expected a number"),
    "an infinite score": ("query,train,score\n0,1,inf\n", "line 2: score is 'inf'"),
    "an empty id": ("query,train,score\n0,,1\n", "line 2: train is '', expected an id"),
    "a short row": ("query,train,score\n0,1\n", "line 2: 2 columns, expected 3"),
    "an id of two lines": ('query,train,score\n0,"a\nb",1\n', "has a line end"),
    "an infinite sum": (
        "query,train,score\n0,1,1.7e308\n1,1,1.7e308\n",
        "the sum of the scores of training example '1' is not finite",
    ),
    "two labels": ("train,score,train_label\n1,2,a\n1,2,b\n", "'1' has two labels", "'a' and 'b'"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_tables_are_refused(case, table, influence):
    text, *says = BAD_TABLES[case]
    table.write_text(text)
    refused(influence("select", table, "--keep", "--top", "1"), 1, str(table), *says)


def test_classes_need_labels(table, influence):
    table.write_text("query,train,score,train_label\n0,1,2,\n")
    flags = ("--keep", "--top", "1", "--per-class")
    refused(influence("select", table, *flags), 2, f"--per-class: {table} has no labels")
    table.write_text("query,train,score\n0,1,2\n")
    refused(influence("select", table, *flags), 2, f"--per-class: {table} has no labels")


def test_a_missing_file_is_refused(influence):
    refused(influence("select", "no.csv", "--keep", "--top", "1"), 2, "no.csv: no such file")
