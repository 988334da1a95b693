"""influence report: what its page holds, and its messages."""

import base64
import csv
import hashlib
import importlib.util
import io
import re
import subprocess
import sys

import pytest

from influence_cli import open_run
from influence_cli.output.tables import TableWriter
from influence_cli.progress import Reporter
from influence_cli.report import page
from influence_cli.report.run_examples import open_source
from influence_cli.report.write import PagedTableWriter, TablePage
from tests.conftest import DEFINITION
from tests.forked import run_ranks
from tests.report.pages import parse_page, read_data, read_pictures, write_table

COLUMNS = "query,kind,rank,train,score,query_label,train_label,query_text,train_text"
ROWS = (
    "0,proponent,1,4,2.5,a,a,a query,an example",
    "0,opponent,1,7,-1.5,a,b,a query,another",
    "1,proponent,1,4,0.5,b,a,,an example",
)
HOSTILE = (
    "</script><script>window.pwned=1</script>",
    "<img src=x onerror=alert(1)>",
    "javascript:alert(1)",
    "=HYPERLINK(1)",
    "\u202eevil\x00\x1b[31m",
    "<!--<script>",
    "{{ 7*7 }}",
    "a & b &amp; c",
    "w" * 10_000,
)


def test_a_page_has_each_example_once_and_its_pairs_in_order(influence, tmp_path):
    table = write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    assert influence("report", table, "-o", tmp_path / "page.html").code == 0
    data = read_data(tmp_path / "page.html")
    assert data["examples"] == [
        ["query", "0", "a", "a query"],
        ["train", "4", "a", "an example"],
        ["train", "7", "b", "another"],
        ["query", "1", "b"],
    ]
    (view,) = data["views"]
    assert view["queries"] == [[0, [[1, 1, 1, 2.5], [2, 0, 1, -1.5]]], [3, [[1, 1, 1, 0.5]]]]


def test_hostile_texts_stay_text(influence, tmp_path):
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS.split(","))
    for number, text in enumerate(HOSTILE):
        writer.writerow([text, "proponent", 1, number, 1, text, text, text, text])
    (tmp_path / "hostile.csv").write_text(file.getvalue(), encoding="utf-8", newline="")
    title = HOSTILE[0]
    result = influence(
        "report", tmp_path / "hostile.csv", "--title", title, "-o", tmp_path / "p.html"
    )
    assert result.code == 0, result.err
    parsed = parse_page(tmp_path / "p.html")
    assert [attributes.get("id") for tag, attributes in parsed.tags if tag == "script"] == [
        "data", "pictures", None,
    ]  # fmt: skip
    assert not [tag for tag, _ in parsed.tags if tag == "img"]
    assert title in parsed.text
    data = read_data(tmp_path / "p.html")
    labels = [example[2] for example in data["examples"] if example[0] == "train"]
    assert labels[:4] == list(HOSTILE[:4])
    assert labels[4] == r"\u202eevil\x00\x1b[31m"  # characters that act are shown as escapes
    assert data["examples"][-1][3].endswith("… (10,000 characters)")


def test_scripts_and_emoji_keep_their_joiners(influence, tmp_path):
    text = "می\u200cخواهم \U0001f469\u200d\U0001f52c"
    table = write_table(tmp_path / "t.csv", COLUMNS, f"0,proponent,1,4,2.5,a,a,{text},x")
    influence("report", table, "-o", tmp_path / "page.html")
    assert read_data(tmp_path / "page.html")["examples"][0][3] == text


class ClosedPipe(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_closed_pipe_of_the_table_leaves_the_page(make_run, tmp_path):
    html, source = tmp_path / "page.html", open_source(make_run(), None, [])
    writer = PagedTableWriter(
        TableWriter("csv", None, ClosedPipe()), TablePage(html, source, Reporter(), None)
    )
    with pytest.raises(BrokenPipeError):
        writer.write([(0, 3, 2.0), (0, 4, 1.0)], ("query", "train", "score"), dict)
    ((_, pairs),) = read_data(html)["views"][0]["queries"]
    assert [pair[3] for pair in pairs] == [2.0, 1.0]


def test_ranks_write_one_page(influence, make_run, tmp_path):
    run = make_run()
    ended = run_ranks(2, "score", run, "--report", tmp_path / "ranks.html", place=tmp_path)
    assert ended.code == 0, ended.err
    influence("score", run, "--report", tmp_path / "one.html")
    assert read_data(tmp_path / "ranks.html") == read_data(tmp_path / "one.html")


def test_the_policy_of_the_page_allows_its_own_style_and_script_alone(influence, tmp_path):
    table = write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    influence("report", table, "-o", tmp_path / "page.html")
    parsed = parse_page(tmp_path / "page.html")
    policy = next(
        attributes["content"]
        for tag, attributes in parsed.tags
        if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    for name in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(parsed.scripts[name].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy
    addresses = [
        value
        for _, attributes in parsed.tags
        for key, value in attributes.items()
        if key in ("src", "href") and value
    ]
    assert all(address.startswith(("#", "data:")) for address in addresses)


def test_markup_style_and_script_are_small(influence, tmp_path):
    table = write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    influence("report", table, "-o", tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 300_000


def test_tables_that_differ_in_by_alone_are_one_view(influence, make_run, tmp_path):
    run = make_run()
    for name, flags in (
        ("plain", []),
        ("layers", ["--by", "layer"]),
        ("steps", ["--by", "checkpoint"]),
    ):
        done = influence("score", run, "--top", 3, *flags, "-o", tmp_path / f"{name}.csv")
        assert done.code == 0, done.err
    files = [tmp_path / f"{name}.csv" for name in ("layers", "plain", "steps")]
    assert influence("report", *files, "-o", tmp_path / "page.html").code == 0
    (view,) = read_data(tmp_path / "page.html")["views"]
    for _, rows in view["queries"]:
        for *_, score, parts in rows:
            assert set(parts) == {"layer", "checkpoint"}
            for shares in parts.values():
                assert sum(share for _, share in shares) == pytest.approx(score, rel=1e-5)


def test_tables_without_a_record_are_views_of_their_own(influence, tmp_path):
    first = write_table(tmp_path / "a.csv", COLUMNS, *ROWS)
    second = write_table(tmp_path / "b.csv", COLUMNS, *ROWS)
    assert influence("report", first, second, "-o", tmp_path / "page.html").code == 0
    assert len(read_data(tmp_path / "page.html")["views"]) == 2


def test_tables_of_two_trainings_are_noted(influence, make_run, tmp_path):
    for name, steps, flags in (
        ("a", (10, 20), []),
        ("b", (30, 40), []),
        ("c", (10, 20), ["--by", "layer"]),
    ):
        influence(
            "score", make_run(name, steps=steps), "--top", 1, *flags, "-o", tmp_path / f"{name}.csv"
        )
    same = influence("report", tmp_path / "a.csv", tmp_path / "c.csv", "-o", tmp_path / "p.html")
    assert (same.code, "in common" in same.err) == (0, False)
    other = influence("report", tmp_path / "a.csv", tmp_path / "b.csv", "-o", tmp_path / "p.html")
    assert other.code == 0 and "b.csv have no checkpoint in common" in other.err


def test_a_page_keeps_the_strongest_pairs_and_counts_all(influence, make_run, tmp_path):
    run = make_run()
    influence("score", run, "--top", "all", "-o", tmp_path / "all.csv")
    influence("score", run, "--top", 2, "-o", tmp_path / "two.csv")
    for name in ("all", "two"):
        influence("report", tmp_path / f"{name}.csv", "--top", 2, "-o", tmp_path / f"{name}.html")
    pages = [read_data(tmp_path / f"{name}.html")["views"][0]["queries"] for name in ("all", "two")]
    assert [[row[3] for row in rows] for _, rows in pages[0]] == [
        [row[3] for row in rows] for _, rows in pages[1]
    ]
    assert "120 scores from" in (tmp_path / "all.html").read_text()  # 6 queries, 20 examples


def test_pairs_of_a_trace_are_proponents_above_0(influence, tmp_path):
    columns = "query,train,step,score,running,query_label,train_label"
    rows = ("3,5,10,2.0,2.0,a,b", "3,5,20,-0.5,1.5,a,b", "3,6,10,-1.0,-1.0,a,a")
    table = write_table(tmp_path / "trace.csv", columns, *rows)
    assert influence("report", table, "-o", tmp_path / "page.html").code == 0
    ((_, pairs),) = read_data(tmp_path / "page.html")["views"][0]["queries"]
    assert pairs == [
        [1, 1, 1, 1.5, {"step": [["10", 2.0], ["20", -0.5]]}],
        [2, 0, 1, -1.0, {"step": [["10", -1.0]]}],
    ]


def test_figures_of_quality_are_in_the_overview(influence, tmp_path):
    columns = "method,protocol,figure,query,value,low,high,n,cost"
    rows = (
        "dve,lds,spearman,all,0.68,0.61,0.75,30,40 trainings",
        "dve,lds,spearman,0,0.5,,,40,",
    )
    table = write_table(tmp_path / "lds.csv", columns, *rows)
    assert influence("report", table, "-o", tmp_path / "page.html").code == 0
    text = parse_page(tmp_path / "page.html").text
    assert "0.61 to 0.75" in text and "40 trainings" in text and "1 more row, about" in text


def test_a_page_says_how_its_table_was_made(influence, make_run, tmp_path):
    influence("score", make_run(), "--top", 2, "-o", tmp_path / "scores.csv")
    influence("report", tmp_path / "scores.csv", "-o", tmp_path / "page.html")
    text = parse_page(tmp_path / "page.html").text
    assert "tracin" in text and "torch " in text and "steps 10, 20" in text
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text)


def test_a_self_table_keeps_its_losses(influence, make_run, tmp_path):
    influence("self", make_run(), "--top", "all", "-o", tmp_path / "self.csv")
    influence("report", tmp_path / "self.csv", "-o", tmp_path / "page.html")
    (entries,) = read_data(tmp_path / "page.html")["lists"]
    with (tmp_path / "self.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(score, loss) for _, score, loss in entries["rows"]] == [
        (pytest.approx(float(row["score"])), pytest.approx(float(row["loss"]))) for row in rows
    ]


IMAGE = """
def image(example):
    return (example[0].reshape(2, 2) * 0.0 + int(example[1]) / 4)
"""


def test_score_report_and_python_write_the_page_of_the_table(influence, make_run, tmp_path):
    run = make_run("run", DEFINITION + IMAGE)
    flags = ["--top", 2, "-o", tmp_path / "scores.csv", "--report", tmp_path / "score.html"]
    assert influence("score", run, *flags).code == 0
    influence("report", tmp_path / "scores.csv", "--run", run, "-o", tmp_path / "report.html")
    open_run(run).score(top=2).report(tmp_path / "python.html")
    expected = read_data(tmp_path / "report.html")
    assert read_pictures(tmp_path / "report.html")
    for name in ("score", "python"):
        assert read_data(tmp_path / f"{name}.html") == expected
        assert read_pictures(tmp_path / f"{name}.html") == read_pictures(tmp_path / "report.html")


def test_the_page_of_self_influence_in_python_is_that_of_its_table(influence, make_run, tmp_path):
    run = make_run()
    influence("self", run, "--top", 5, "-o", tmp_path / "self.csv")
    influence("report", tmp_path / "self.csv", "-o", tmp_path / "a.html")
    open_run(run).self_influence(top=5).report(tmp_path / "b.html")
    assert read_data(tmp_path / "a.html") == read_data(tmp_path / "b.html")


def test_a_run_gives_labels_that_the_table_lacks(influence, make_run, tmp_path):
    table = write_table(tmp_path / "scores.csv", "query,train,score", "0,3,1.5")
    result = influence("report", table, "--run", make_run(), "-o", tmp_path / "page.html")
    assert "no pictures: definition.py has no image(example)" in result.err
    examples = read_data(tmp_path / "page.html")["examples"]
    assert [example[2] in ("a", "b", "c") for example in examples] == [True, True]


def test_a_page_without_a_run_needs_no_torch(tmp_path):
    table = write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    program = f"""
import sys
from influence_cli.cli import main
sys.argv = ["influence", "report", {str(table)!r}, "-o", {str(tmp_path / "page.html")!r}]
try: main()
except SystemExit as ended: print(ended.code or 0, "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["0", "False"], done.stderr


def test_a_page_goes_to_a_pipe(influence, tmp_path):
    table = write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    assert influence("report", table).out.startswith("<!doctype html>")


# ---------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ("a,b", ["1,2"], "t.csv is no table of score, self, trace or evaluate\n  found: a, b"),
        (COLUMNS, [], "t.csv has no rows"),
        (COLUMNS, ["0,proponent,1,4,x,,,,"], "t.csv, line 2: score is 'x', expected a number"),
        (COLUMNS, [ROWS[0], ROWS[0]], "t.csv, line 3: the pair of query 0 and training example 4 stands twice"),
        (COLUMNS, [ROWS[0], "1,proponent,1,4,1,b,OTHER,,an example"], "the label of train 4 differs\n  found: 'a' and 'OTHER'"),
        ("method,protocol,figure,value", ["a,b,c,x"], "t.csv, line 2: value is 'x', expected a number"),
        ("query,train,layer,score", ["0,1,a,1e308", "0,1,b,1e308"], "sum to inf"),
    ],
)  # fmt: skip
def test_a_table_that_is_none_is_refused(influence, tmp_path, columns, rows, message):
    table = write_table(tmp_path / "t.csv", columns, *rows)
    result = influence("report", table, "-o", tmp_path / "page.html")
    assert (result.code, message in result.err) == (1, True), result.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.csv"], "missing.csv: no such file\n  expected: a table that score, self, trace"),
        (["-", "-"], "- stands twice"),
        (["scores.csv", "--top", "0"], "--top 0"),
        (["scores.csv", "--definition", "d.py"], "--definition needs --run"),
        (["scores.csv", "--run", "nowhere"], "--run nowhere: no such folder"),
        (["scores.csv", "-o", "no/page.html"], "-o no/page.html: its folder does not exist"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    influence, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    write_table(tmp_path / "scores.csv", COLUMNS, *ROWS)
    result = influence("report", *arguments, *([] if "-o" in arguments else ["-o", "page.html"]))
    assert (result.code, message in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        (
            "query,train,score", "0,25,1.0",
            "names train 25\n  train_data() has 20 examples, numbered from 0",
        ),
        (
            "query,train,score,train_label", "0,3,1.0,z",
            "the label of train 3 differs\n  the table has 'z', the run has ",
        ),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_is_refused(influence, make_run, tmp_path, columns, row, message):
    table = write_table(tmp_path / "scores.csv", columns, row)
    result = influence("report", table, "--run", make_run(), "-o", tmp_path / "page.html")
    assert result.code == 1 and "does not fit the run run" in result.err and message in result.err
    assert "--run RUN" in result.err


def test_one_part_of_a_table_is_refused(influence, make_run, tmp_path):
    influence("score", make_run(), "--shard", "1/2", "-o", tmp_path / "part.csv")
    result = influence("report", tmp_path / "part.csv", "-o", tmp_path / "page.html")
    assert result.code == 2 and "part.csv is part 1 of 2" in result.err
    assert "influence merge" in result.err


def test_two_tables_of_the_same_scores_are_refused(influence, make_run, tmp_path):
    run = make_run()
    for top in (2, 3):
        influence("score", run, "--top", top, "-o", tmp_path / f"top{top}.csv")
    files = (tmp_path / "top2.csv", tmp_path / "top3.csv")
    result = influence("report", *files, "-o", tmp_path / "page.html")
    assert result.code == 1 and "top3.csv have the same scores" in result.err


def test_groups_and_examples_are_not_confused(influence, make_run, tmp_path):
    run = make_run("run", DEFINITION.replace('"abc"[int(example[1])]', "int(example[1])"))
    influence("score", run, "--group-by", "label", "-o", tmp_path / "groups.csv")
    influence("score", run, "-o", tmp_path / "scores.csv")
    files = (tmp_path / "groups.csv", tmp_path / "scores.csv")
    assert influence("report", *files, "--run", run, "-o", tmp_path / "page.html").code == 0
    spaces = {example[0] for example in read_data(tmp_path / "page.html")["examples"]}
    assert spaces == {"query", "train", "group"}


@pytest.mark.parametrize(
    ("library", "message"),
    [("jinja2", "a report needs Jinja2"), ("PIL", "image() in definition.py makes pictures")],
)
def test_a_missing_library_is_named_with_its_extra(
    influence, make_run, tmp_path, monkeypatch, library, message
):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == library else find_spec(name, *rest)
    )  # fmt: skip
    run = make_run("run", DEFINITION + IMAGE)
    table = write_table(tmp_path / "scores.csv", "query,train,score", "0,3,1.5")
    for command in (
        ("report", table, "--run", run, "-o", tmp_path / "page.html"),
        ("score", run, "--report", tmp_path / "page.html"),
    ):
        result = influence(*command)
        assert (result.code, result.out) == (2, "") and message in result.err
        assert "pip install 'influence-cli[report]'" in result.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--report", "page.html", "--shard", "1/2"], "--report needs the scores of all examples"),
        (["--report", "no/page.html"], "--report no/page.html: its folder does not exist"),
        (["--report", "a.html", "-o", "a.html"], "-o and --report both name a.html"),
    ],
)
def test_score_refuses_a_page_that_it_cannot_write(
    influence, make_run, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    result = influence("score", make_run(), *flags)
    assert result.code == 2 and message in result.err


def test_an_image_that_fails_is_named(influence, make_run, tmp_path):
    table = write_table(tmp_path / "scores.csv", "query,train,score", "0,3,1.5")
    run = make_run(
        "run", DEFINITION + "\ndef image(example):\n    return example[0].view(2, 2) - 9\n"
    )
    result = influence("report", table, "--run", run, "-o", tmp_path / "page.html")
    assert result.code == 1
    assert "the pixels of image() of example 0 of query_data() are out of range" in result.err
    assert "expected: floats from 0 to 1, or integers from 0 to 255" in result.err


def test_no_parser_takes_embedded_json_for_markup():
    assert (
        page.embed_json({"a": "</script>&\u2028"}) == '{"a":"\\u003c/script\\u003e\\u0026\u2028"}'
    )
