"""Queries from the command line: --query and --query-file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import DEFINITION, build_run
from tests.forked import run_ranks
from tests.methods.test_tracin_we import DEFINITION as TEXTS
from tests.refusals import refused, replaced
from tests.training import DEFINITION as TRAINED
from tests.training import train

ROOT = Path(__file__).parents[2]
ROWS = """
import json

def encode(row):
    return torch.tensor(json.loads(row["x"]) if isinstance(row["x"], str) else row["x"])

def example(row):
    label = row.get("label")
    return encode(row), None if label in (None, "") else torch.tensor("abc".index(label))

def label(example):
    return None if example[1] is None else "abc"[int(example[1])]

def describe(example):
    return " ".join(f"{float(x):.2f}" for x in example[0])

def relabel(example, label):
    return example[0], torch.tensor(label)

def outputs(model, batch):
    return model(batch[0])
"""
LABEL = '\ndef label(example):\n    return "abc"[int(example[1])]\n'
WITH_ROWS = replaced(DEFINITION, (LABEL, "")) + ROWS


def space_of(run: Path) -> dict:
    space: dict = {"__name__": "definition_of_a_test"}
    exec((run / "definition.py").read_text(), space)
    return space


def query_row(run: Path, number: int, labelled: bool = True) -> dict:
    """query_data()[number] as a row."""
    x, y = space_of(run)["query_data"]()[number]
    return {"x": x.tolist(), **({"label": "abc"[int(y)]} if labelled else {})}


def write_rows(run: Path, path: Path, numbers: list[int], labelled: bool = True) -> Path:
    rows = [query_row(run, number, labelled) for number in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("rows") / "run", WITH_ROWS)


def without_query(table: str, head: bool = True) -> list[str]:
    return [line.partition(",")[2] for line in table.splitlines()[0 if head else 1 :]]


CACHES = {"cached": [], "none": ["--cache", "none"], "projected": ["--project", "64"]}


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_of_query_data_has_its_scores_bit_for_bit(run, influence, cache):
    flags = ["--top", "all", *CACHES[cache]]
    before = influence("score", run, "--queries", "3", *flags)
    result = influence("score", run, "--query", json.dumps(query_row(run, 3)), *flags)
    assert result.code == 0, result.err
    assert result.err == ""
    assert {row["query"] for row in result.rows} == {"0"}
    assert without_query(result.out) == without_query(before.out)
    assert influence("score", run, "--queries", "3", *flags).out == before.out


def test_a_single_row_is_computed_as_one_of_several_queries(make_run, influence):
    """A measure of its own needs a probe of its own, on a dataset of one example."""
    measure = """
def measure(model, batch):
    return model(batch[0]).logsumexp(1)
"""
    run = make_run(definition=WITH_ROWS + measure)
    flags = ("--top", "all", "--cache", "none")
    plain = influence("score", run, "--queries", "3", *flags)
    result = influence("score", run, "--query", json.dumps(query_row(run, 3)), *flags)
    assert result.err == ""
    assert without_query(result.out) == without_query(plain.out)


def test_a_file_of_all_queries_has_the_table_of_query_data(run, influence, tmp_path):
    path = write_rows(run, tmp_path / "rows.jsonl", [*range(6)])
    cache = ["--cache", tmp_path / "cache"]
    plain = influence("score", run, "--top", "all", *cache)
    result = influence("score", run, "--query-file", path, "--top", "all", *cache)
    assert result.code == 0, result.err
    assert result.out == plain.out
    selected = influence("score", run, "--query-file", path, "--queries", "4", "--top", "3")
    assert {row["query"] for row in selected.rows} == {"4"}


def test_the_same_command_again_reads_the_cache_and_others_mix_with_nothing(
    make_run, influence, tmp_path
):
    run = make_run(definition=WITH_ROWS)
    first = write_rows(run, tmp_path / "first.jsonl", [0, 1])
    second = write_rows(run, tmp_path / "second.jsonl", [1, 0])
    tables = {}
    for path in (first, second, first):
        result = influence("score", run, "--query-file", path, "--top", "all")
        assert tables.setdefault(path, result.out) == result.out
    units = list(run.glob(".influence/*/step-*/query-*/*/*/*.safetensors"))
    assert len(units) == 2 * 2  # files and checkpoints, once each
    assert not list(run.glob(".influence/*/step-*/query/*"))
    assert influence("check", run).code == 0  # it reads these units, too
    units[0].write_bytes(units[0].read_bytes()[:-8])
    assert influence("check", run).code == 1


def test_csv_and_parquet_files_are_rows_too(run, influence, tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    row = query_row(run, 2)
    (tmp_path / "rows.csv").write_text(f'x,label\n"{row["x"]}",{row["label"]}\n')
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    plain = influence("score", run, "--queries", "2", "--cache", "none")
    for name in ("rows.csv", "rows.parquet"):
        result = influence("score", run, "--query-file", tmp_path / name, "--cache", "none")
        assert without_query(result.out) == without_query(plain.out)


def predictions(run: Path, step: int) -> list[int]:
    """The class that a checkpoint predicts for each query, one at a time."""
    space = space_of(run)
    model = space["model"]()
    model.load_state_dict(load_file(run / "checkpoints" / f"step-{step:06d}.safetensors"))
    with torch.no_grad():
        return [int(model(x[None]).argmax()) for x, _ in space["query_data"]()]


@pytest.mark.parametrize(("flags", "step"), [([], 20), (["--steps", "10"], 10)])
@pytest.mark.parametrize("cache", [[], ["--cache", "none"]])
def test_a_query_without_a_label_is_explained_for_the_predicted_one(
    run, influence, tmp_path, flags, step, cache
):
    predicted = ["abc"[k] for k in predictions(run, step)]
    path = write_rows(run, tmp_path / "rows.jsonl", [*range(6)], labelled=False)
    result = influence("score", run, "--query-file", path, "--top", "all", *flags, *cache)
    assert result.code == 0, result.err
    for index in range(3):
        assert (
            f"note: query {index} has no label: influence explains the label '{predicted[index]}'"
            in (result.err)
        )
    assert "note: 3 more queries have no label: influence explains the predicted" in result.err
    assert len(result.err.splitlines()) == 4
    rows = [query_row(run, index) | {"label": predicted[index]} for index in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = influence("score", run, "--query-file", path, "--top", "all", *flags, *cache)
    assert result.out == labelled.out
    assert [row["query_label"] for row in result.rows[::20]] == predicted


def test_a_selected_query_is_labelled_and_only_it_is_noted(run, influence, tmp_path):
    path = write_rows(run, tmp_path / "rows.jsonl", [0, 1, 2, 3, 4, 5] * 5, labelled=False)
    result = influence("score", run, "--query-file", path, "--queries", "27")
    assert result.code == 0, result.err
    assert len(result.err.splitlines()) == 1
    assert result.err.startswith("note: query 27 has no label")
    assert {row["query_label"] for row in result.rows} == {"abc"[predictions(run, 20)[3]]}


def test_where_training_examples_have_no_labels_none_is_predicted(make_run, influence):
    """As for texts of a language model: outputs() is not called."""
    language_model = """
def label(example):
    return ""

def outputs(model, batch):
    raise AssertionError
"""
    run = make_run(definition=WITH_ROWS + language_model)
    result = influence("score", run, "--query", json.dumps(query_row(run, 0)))
    assert result.code == 0, result.err
    assert result.err == ""


def test_quiet_shows_no_note_of_labels(run, influence):
    row = json.dumps(query_row(run, 0, labelled=False))
    assert influence("score", run, "--query", row, "--quiet").err == ""


@pytest.mark.parametrize("method", ["tracin", "grad-dot", "grad-cos", "repsim", "random"])
def test_each_method_takes_queries_of_the_command_line(run, influence, method):
    row = json.dumps(query_row(run, 3))
    result = influence(
        "score", run, "--method", method, "--query", row, "--query", row, "--top", "2"
    )
    assert result.code == 0, result.err
    assert {row["query"] for row in result.rows} == {"0", "1"}
    if method == "random":  # of the number of the query
        return
    plain = influence("score", run, "--method", method, "--queries", "3", "--top", "2")
    for number in "01":
        rows = [row for row in result.rows if row["query"] == number]
        assert [row["train"] for row in rows] == [row["train"] for row in plain.rows]
        scores = [[float(row["score"]) for row in table] for table in (rows, plain.rows)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_shards_of_other_queries_are_refused_by_merge(run, influence, tmp_path):
    rows = [json.dumps(query_row(run, number)) for number in (1, 2)]
    for part, row in zip(("1", "2"), rows, strict=True):
        out = tmp_path / f"{part}.csv"
        assert influence("score", run, "--query", row, "--shard", f"{part}/2", "-o", out).code == 0
    refused(
        influence("merge", tmp_path / "1.csv", tmp_path / "2.csv"),
        1,
        "answers another question",
        "rows of query",
    )


def test_merged_shards_of_a_query_are_the_whole(run, influence, tmp_path):
    row = json.dumps(query_row(run, 1, labelled=False))
    whole = influence("score", run, "--query", row, "--top", "4")
    parts = [tmp_path / f"{part}.csv" for part in (1, 2)]
    for part, path in enumerate(parts, start=1):
        influence("score", run, "--query", row, "--top", "4", "--shard", f"{part}/2", "-o", path)
    assert influence("merge", *parts, "--top", "4").out == whole.out


def test_ranks_share_the_work_and_the_labels(run, influence, tmp_path):
    row = json.dumps(query_row(run, 1, labelled=False))
    expected = influence("score", run, "--query", row, "--top", "4")
    flags = ("--query", row, "--top", "4", "--cache", tmp_path / "cache")
    ranks = run_ranks(2, "score", run, *flags, place=tmp_path)
    assert (ranks.code, ranks.out) == (0, expected.out), ranks.err
    assert ranks.err.count("has no label") == 1


def test_text_is_the_column_text(make_run, influence):
    definition = replaced(
        WITH_ROWS,
        (
            '    label = row.get("label")',
            '    print("row:", row)\n    label = "a"\n    row["x"] = [1.0] * 4',
        ),
    )
    result = influence("score", make_run(definition=definition), "--query", "what, { is this?")
    assert result.code == 0, result.err
    assert "row: {'text': 'what, { is this?'}" in result.err


IN_DOUBLE = replaced(
    replaced(TRAINED, (LABEL, "")) + ROWS, ('else row["x"])', 'else row["x"], dtype=torch.float64)')
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trained") / "run", every=4, definition=IN_DOUBLE)


@pytest.mark.parametrize(
    "flags",
    [
        ["score", "--method", "dve"],
        ["score", "--method", "dve", "--form", "embedding"],
        ["score", "--method", "unroll"],
        ["trace"],
    ],
    ids=" ".join,
)
def test_methods_that_follow_training_take_queries_of_the_command_line(trained, influence, flags):
    command, *method = flags
    top = ["--top", "all"] if command == "score" else []
    plain = influence(command, trained, *method, "--queries", "3", *top)
    row = json.dumps(query_row(trained, 3))
    result = influence(command, trained, *method, "--query", row, *top)
    assert result.code == 0, result.err
    assert without_query(result.out) == without_query(plain.out)


def test_words_of_training_texts_explain_a_query_of_the_command_line(make_run, influence):
    encode = """
def example(row):
    return torch.tensor(row["ids"]), row["label"]
"""
    run = make_run(definition=TEXTS + encode)
    ids, label = space_of(run)["query_data"]()[3]
    row = json.dumps({"ids": ids.tolist(), "label": label})
    flags = ("--method", "tracin-we", "--by", "word", "--cache", "none")
    plain = influence("score", run, "--queries", "3", *flags)
    result = influence("score", run, "--query", row, *flags)
    assert result.code == 0, result.err
    assert without_query(result.out) == without_query(plain.out)


BAD_FLAGS = {
    "both": (["--query", "a", "--query-file", "rows.csv"], "--query and --query-file both give"),
    "selection": (["--query", "a", "--queries", "0"], "leave out --queries"),
    "json": (["--query", '{"text": '], "is no JSON object", "expected: a text, or an object like"),
    "no file": (["--query-file", "rows.csv"], "--query-file rows.csv: no such file"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_flags_that_contradict_are_refused(run, influence, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, *says = BAD_FLAGS[case]
    refused(influence("score", run, *flags), 2, *says)


def test_ids_out_of_range_name_the_file(run, influence, tmp_path):
    path = write_rows(run, tmp_path / "rows.jsonl", [0, 1])
    result = influence("score", run, "--query-file", path, "--queries", "2")
    refused(result, 2, "--queries 2: out of range", f"--query-file {path} has 2 examples (0 to 1)")


def test_a_definition_without_example_is_shown_how_to_write_it(make_run, influence):
    refused(
        influence("score", make_run(), "--query", "a"),
        2,
        "--query needs example(row) in definition.py",
        "add for example: def example(row): return",
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('row["x"]) if', 'row["y"]) if'), ("row 1 of --query-file", "raised KeyError: 'y'", "its columns: x, label")),
        (("    return encode(row), None", "    encode(row), None"), ("row 0 of --query-file", "example() returned None")),
        (("def example(row):", "def example():"), ("does not take the arguments", "expected: def example(row)")),
    ],
)  # fmt: skip
def test_an_error_of_example_names_the_row(make_run, influence, tmp_path, change, says):
    run = make_run(definition=replaced(WITH_ROWS, change))
    good, bad = query_row(run, 0), query_row(run, 1)
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(good) + "\n" + json.dumps({**bad, "x": str(bad["x"])}) + "\n"
    )
    result = influence("score", run, "--query-file", tmp_path / "rows.jsonl")
    refused(result, 1, *says)


UNLABELLED = {
    "no outputs": (("def outputs(", "def other("), "definition.py lacks outputs(), so influence"),
    "no relabel": (("def relabel(", "def other("), "lacks relabel()", "def relabel(example, label)"),
    "regression": (("return model(batch[0])\n", "return model(batch[0])[:, :1]\n"), "returned (1, 1)"),
    "a vector": (("return model(batch[0])\n", "return model(batch[0])[:, 0]\n"), "returned (1,)"),
    "no tensor": (("return model(batch[0])\n", "return [1, 2]\n"), "returned [1, 2]"),
    "nan": (("return model(batch[0])\n", "return model(batch[0]) / 0 * 0\n"), "are not finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNLABELLED)
def test_where_no_label_can_be_predicted_the_query_needs_one(make_run, influence, case):
    (old, new), *says = UNLABELLED[case]
    head, _, tail = WITH_ROWS.rpartition(old)
    assert head
    run = make_run(definition=head + new + tail)
    row = json.dumps(query_row(run, 0, labelled=False))
    result = influence("score", run, "--query", row)
    refused(result, 1, "query 0 of --query has no label", "add a label to the row", *says)
