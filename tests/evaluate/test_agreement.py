"""influence evaluate RUN agreement: score files with known answers, and methods of a run."""

import sys

import numpy as np
import pytest

from tests.refusals import refused, replaced
from tests.training import DEFINITION, train

HEAD = "query,kind,rank,train,score,query_label,train_label,query_text,train_text\n"


def write_scores(path, scores_QN, ids=None):
    lines = [
        f"{query},proponent,1,{(ids or range(len(row)))[at]},{score!r},,,,\n"
        for query, row in enumerate(scores_QN)
        for at, score in enumerate(map(float, row))
    ]
    path.write_text(HEAD + "".join(lines))
    return path


def agreement(influence, *arguments):
    return influence("evaluate", ".", "agreement", *arguments)


def values_of(result):
    assert result.code == 0, result.err
    return {row["figure"]: float(row["value"]) if row["value"] else None for row in result.rows}


def test_files_with_known_answers(tmp_path, influence):
    rising = np.array([[1.0, 2, 3, 4, 5, 6], [6.0, 5, 4, 3, 2, 1]])
    one = write_scores(tmp_path / "one.csv", rising)
    answers = {
        "same": (rising * 3 + 1, [1, 1, 1]),
        "reversed": (-rising, [-1, -1, 0]),
        "squared": (rising**3, [1, None, 1]),
        "swapped": (rising[:, [1, 0, 2, 3, 5, 4]], [1 - 6 * 4 / 210, None, 1]),
        "ties": (np.sign(rising - 3.5), [0.8783100656536799, None, 1]),
        "constant": (rising * 0, [None, None, None]),
    }
    for name, (scores, (spearman, pearson, overlap)) in answers.items():
        other = write_scores(tmp_path / f"{name}.csv", scores)
        result = agreement(influence, one, other, "--top-k", "3")
        values = values_of(result)
        assert list(values) == ["spearman", "pearson", "noise", "overlap-3"]
        assert values["noise"] == pytest.approx(5**-0.5)  # 6 examples
        if name == "constant":
            assert values["spearman"] is None
            continue
        assert values["spearman"] == pytest.approx(spearman)
        assert values["overlap-3"] == pytest.approx(overlap)
        if pearson is not None:
            assert values["pearson"] == pytest.approx(pearson)
        row = result.rows[0]
        assert row["method"] == f"{one}, {other}"
        assert (row["protocol"], row["n"], row["cost"]) == ("agreement", "2", "0 trainings")


@pytest.mark.parametrize("ending", ["tsv", "jsonl", "parquet"])
def test_every_format_and_tables_of_parts_are_read(ending, tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    flags = ("score", run, "--top", "all", "--lr", "0.3")
    other = tmp_path / f"other.{ending}"
    assert influence(*flags, "-o", tmp_path / "one.csv").code == 0
    assert influence(*flags, "-o", other, "--by", "checkpoint").code == 0
    values = values_of(agreement(influence, tmp_path / "one.csv", other))
    assert values.pop("noise") == pytest.approx(23**-0.5)
    assert values == {name: pytest.approx(1) for name in ("spearman", "pearson", "overlap-10")}


def test_tables_of_self_are_one_query(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    for name, rate in (("a", "point"), ("b", "none")):
        flags = ("--lr-weights", rate, "--top", "all", "-o", tmp_path / f"{name}.csv")
        assert influence("self", run, *flags).code == 0
    result = agreement(influence, tmp_path / "a.csv", tmp_path / "b.csv", "--by", "query")
    assert [row["query"] for row in result.rows] == ["all"] * 8
    assert result.rows[0]["n"] == "24"


def test_pairs_of_one_file_are_left_out_and_a_note_says_so(tmp_path, influence):
    one = write_scores(tmp_path / "one.csv", np.array([[5.0, 4, 3, 2]]), ids=[1, 2, 3, 4])
    other = write_scores(tmp_path / "other.csv", np.array([[9.0, 7, 5, 4]]), ids=[8, 1, 2, 3])
    result = agreement(influence, one, other, "--top-k", "2")
    assert values_of(result) == {
        "spearman": 1,
        "pearson": pytest.approx(0.9819805),
        "noise": pytest.approx(2**-0.5),
        "overlap-2": 0.5,
    }
    assert "2 pairs are in one of the two only" in result.err
    assert "--top all" in result.err


def test_methods_of_a_run_are_compared_in_pairs(tmp_path, influence):
    run = train(tmp_path / "run", every=4)
    methods = ("tracin", "grad-dot", "random")
    flags = [word for method in methods for word in ("--method", method)]
    result = influence("evaluate", run, "agreement", *flags, "--lr", "0.3", "--top-k", "5")
    assert result.code == 0, result.err
    pairs = ["tracin, grad-dot", "tracin, random", "grad-dot, random"]
    assert list(dict.fromkeys(row["method"] for row in result.rows)) == pairs
    for method in methods[:2]:
        rate = ("--lr", "0.3") if method == "tracin" else ()
        scored = influence(
            "score",
            run,
            "--method",
            method,
            *rate,
            "--top",
            "all",
            "-o",
            tmp_path / f"{method}.csv",
        )
        assert scored.code == 0, scored.err
    files = (tmp_path / "tracin.csv", tmp_path / "grad-dot.csv")
    of_files = values_of(agreement(influence, *files, "--top-k", "5"))
    of_methods = {row["figure"]: float(row["value"]) for row in result.rows[:4]}
    assert of_methods == pytest.approx(of_files)
    assert of_methods["spearman"] > 0.5 > abs(float(result.rows[4]["value"]))


def test_runs_are_compared_by_the_scores_of_a_method(tmp_path, influence):
    one, other = (train(tmp_path / name, every=4, rate=rate) for name, rate in RATES.items())
    flags = ("--method", "grad-dot")
    files = []
    for run in (one, other):
        files.append(tmp_path / f"{run.name}.csv")
        scored = influence("score", run, *flags, "--top", "all", "-o", files[-1])
        assert scored.code == 0, scored.err
    expected = values_of(agreement(influence, *files))
    assert 0.3 < expected["spearman"] < 0.999
    for command in ((".", other), (".", one, other), (".", one, files[1]), (".", files[0], other)):
        arguments = (one, *command[1:]) if len(command) == 2 else command
        result = influence("evaluate", arguments[0], "agreement", *arguments[1:], *flags)
        assert values_of(result) == pytest.approx(expected), command
    assert result.rows[0]["method"] == f"{files[0]}, {other} grad-dot"


def test_each_run_has_its_own_module_of_a_name(tmp_path, influence, monkeypatch):
    """Both definitions import losses.py from beside them. One gives each class another weight."""
    definition = replaced(
        DEFINITION,
        (
            "from torch.nn import functional as F",
            "from torch.nn import functional as F\nimport losses",
        ),
        ('F.cross_entropy(model(batch[0]), batch[1], reduction="none")', "losses.of(model, batch)"),
    )
    head = "from torch.nn import functional as F\ndef of(model, batch):\n    "
    body = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'
    runs, files = [], []
    for name, end in (("equal", ""), ("weighted", " * (batch[1] - 1)")):
        run = train(tmp_path / name, every=12)
        (run / "definition.py").write_text(definition)
        (run / "losses.py").write_text(head + body + end + "\n")
        files.append(tmp_path / f"{name}.csv")
        monkeypatch.delitem(sys.modules, "losses", raising=False)  # a command is a new process
        scored = influence(
            "score", run, "--method", "grad-dot", "--top", "all", "--cache", "none", "-o", files[-1]
        )
        assert scored.code == 0, scored.err
        runs.append(run)
    expected = values_of(agreement(influence, *files))
    assert expected["spearman"] < 0.9
    result = influence(
        "evaluate", ".", "agreement", *runs, "--method", "grad-dot", "--cache", "none"
    )
    assert values_of(result) == pytest.approx(expected)


RATES = {"slow": 0.1, "fast": 0.9}


def test_runs_on_other_examples_are_refused(tmp_path, influence):
    one = train(tmp_path / "one", every=12)
    definition = replaced(DEFINITION, ("manual_seed(seed)", "manual_seed(seed + 7)"))
    other = train(tmp_path / "other", every=12, definition=definition)
    command = ("evaluate", one, "agreement", other, "--method", "grad-dot")
    refused(influence(*command), 2, "have other examples in train_data()", "example 0 differs")


def test_bad_commands_are_refused(tmp_path, influence):
    one = write_scores(tmp_path / "one.csv", np.eye(3))
    refused(agreement(influence, one), 2, ". is a run, so its scores need a method")
    refused(agreement(influence, one, tmp_path / "two.csv"), 2, "two.csv: no such file")
    refused(agreement(influence, one, one, "--top-k", "0"), 2, "--top-k '0'")
    flags = ("--method", "tracin")
    refused(agreement(influence, one, one, *flags), 2, "--method does not apply to score files")
    refused(agreement(influence, one, one, "--queries", "0"), 2, "--queries does not apply")
    refused(influence("evaluate", ".", "tsloo", one), 2, "tsloo takes no score files")
    run = train(tmp_path / "run", every=12)
    command = ("evaluate", run, "agreement")
    refused(influence(*command, "--method", "random"), 2, "two --method", "found: random")
    refused(influence(*command), 2, "found: none")
    far = write_scores(tmp_path / "far.csv", np.eye(3), ids=[7, 8, 9])
    refused(agreement(influence, one, far), 2, "no query and training example is in both")


BAD_TABLES = {
    "": "the file is empty",
    "a,b\n1,2\n": "is not a table of score or self",
    HEAD: "has no rows",
    HEAD + "0,proponent,1,3,nan,,,,\n": "line 2: score is 'nan'",
    HEAD + "0,proponent,1,3\n": "line 2: 4 columns, expected 9",
}


@pytest.mark.parametrize("text", BAD_TABLES)
def test_a_table_that_can_not_be_read_is_named(text, tmp_path, influence):
    one = write_scores(tmp_path / "one.csv", np.eye(3))
    (tmp_path / "bad.csv").write_text(text)
    refused(agreement(influence, one, tmp_path / "bad.csv"), 1, "bad.csv", BAD_TABLES[text])
