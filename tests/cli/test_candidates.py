"""--candidates: rows that were not trained on, ranked instead of train_data()."""

import json
from pathlib import Path

import pytest

from influence_cli.methods.table import METHODS
from tests.cli.test_ad_hoc_queries import IN_DOUBLE, WITH_ROWS, space_of
from tests.conftest import build_run
from tests.refusals import refused
from tests.training import train

WITH_IDS = WITH_ROWS + "\ndef id(example):\n    return f'{float(example[0][0]):.3f}'\n"


def train_row(run: Path, number: int) -> dict:
    x, y = space_of(run)["train_data"]()[number]
    return {"x": x.tolist(), "label": "abc"[int(y)]}


def write_candidates(run: Path, path: Path, numbers: list[int]) -> Path:
    path.write_text("".join(json.dumps(train_row(run, number)) + "\n" for number in numbers))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("candidates") / "run", WITH_IDS)


@pytest.mark.parametrize("cache", [["--cache", "none"], []])
@pytest.mark.parametrize("command", ["score", "self"])
def test_all_of_train_data_as_candidates_has_its_table(run, influence, tmp_path, command, cache):
    path = write_candidates(run, tmp_path / "rows.jsonl", [*range(20)])
    plain = influence(command, run, "--top", "all", *cache)
    result = influence(command, run, "--candidates", path, "--top", "all", *cache)
    assert result.code == 0, result.err
    assert result.out == plain.out
    assert influence(command, run, "--top", "all", *cache).out == plain.out


def test_train_counts_rows_of_the_file(run, influence, tmp_path):
    path = write_candidates(run, tmp_path / "rows.jsonl", [7, 3, 11])
    flags = ("--queries", "0:2", "--top", "all", "--cache", "none")
    plain = influence("score", run, "--train", "3", *flags)
    result = influence("score", run, "--candidates", path, "--train", "1", *flags)
    assert {row["train"] for row in result.rows} == {"1"}
    assert [row["score"] for row in result.rows] == [row["score"] for row in plain.rows]
    assert [row["train_id"] for row in result.rows] == [row["train_id"] for row in plain.rows]
    refused(
        influence("score", run, "--candidates", path, "--train", "3"),
        2,
        f"--candidates {path} has 3 examples (0 to 2)",
    )


def test_candidates_of_another_file_have_their_own_place_in_the_cache(
    make_run, influence, tmp_path
):
    run = make_run(definition=WITH_ROWS)
    tables = {}
    for name, numbers in (("a", [0, 1, 2]), ("b", [2, 1, 0]), ("a", [0, 1, 2])):
        path = write_candidates(run, tmp_path / f"{name}.jsonl", numbers)
        result = influence("score", run, "--candidates", path, "--queries", "0", "--top", "all")
        assert result.code == 0, result.err
        assert tables.setdefault(name, result.out) == result.out
    assert len(list(run.glob(".influence/*/step-*/train-*/*/*/*.safetensors"))) == 2 * 2
    assert not list(run.glob(".influence/*/step-*/train/*"))
    for command in ("check", "inspect"):
        assert influence(command, run).code == 0
    # another example() makes other examples, and needs no other cache
    definition = run / "definition.py"
    definition.write_text(
        WITH_ROWS.replace("return encode(row), None", "return 2 * encode(row), None")
    )
    result = influence("score", run, "--candidates", path, "--queries", "0", "--top", "all")
    assert result.code == 0, result.err
    assert result.out != tables["a"]


def test_candidates_and_a_query_come_together(run, influence, tmp_path):
    path = write_candidates(run, tmp_path / "rows.jsonl", [7, 3])
    row = json.dumps(train_row(run, 3))
    result = influence("score", run, "--candidates", path, "--query", row, "--top", "all")
    assert result.code == 0, result.err
    (same,) = (row for row in result.rows if row["train"] == "1")
    assert same["query_id"] == same["train_id"]
    assert float(same["score"]) > 0


def test_a_single_candidate_has_its_score_bit_for_bit(run, influence, tmp_path):
    path = write_candidates(run, tmp_path / "row.jsonl", [5])
    flags = ("--top", "all", "--cache", "none")
    plain = influence("self", run, "--train", "5", *flags)
    result = influence("self", run, "--candidates", path, *flags)
    assert [row["score"] for row in result.rows] == [row["score"] for row in plain.rows]


def test_shards_of_candidates_are_merged_and_other_candidates_refused(run, influence, tmp_path):
    path = write_candidates(run, tmp_path / "rows.jsonl", [*range(20)])
    other = write_candidates(run, tmp_path / "other.jsonl", [*range(19, -1, -1)])
    whole = influence("self", run, "--candidates", path)
    parts = []
    for number, file in ((1, path), (2, path), (2, other)):
        parts.append(tmp_path / f"{len(parts)}.csv")
        flags = ("--candidates", file, "--shard", f"{number}/2", "-o", parts[-1])
        assert influence("self", run, *flags).code == 0
    assert influence("merge", *parts[:2]).out == whole.out
    refused(influence("merge", parts[0], parts[2]), 1, "rows of train")


def test_groups_of_candidates_have_a_line_each(run, influence, tmp_path):
    path = write_candidates(run, tmp_path / "rows.jsonl", [7, 3])
    (tmp_path / "groups.txt").write_text("left\nright\n")
    flags = ("--group-by", tmp_path / "groups.txt", "--queries", "0", "--top", "all")
    result = influence("score", run, "--candidates", path, *flags)
    assert {row["train"] for row in result.rows} == {"left", "right"}


def test_rates_come_from_the_trajectory_of_train_data(tmp_path, influence):
    run = train(tmp_path / "run", every=4, definition=IN_DOUBLE)
    path = write_candidates(run, tmp_path / "rows.jsonl", [0, 1])
    flags = ("--top", "all", "--lr-weights", "segment", "--cache", "none")
    plain = influence("score", run, "--train", "0:2", *flags)
    result = influence("score", run, "--candidates", path, *flags)
    assert result.code == 0, result.err
    assert result.out == plain.out


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.trace])
def test_methods_that_follow_training_refuse_candidates(run, influence, method):
    refused(
        influence("score", run, "--method", method, "--candidates", "rows.csv"),
        2,
        f"--candidates does not apply to --method {method}: it scores examples at the steps",
    )
    assert METHODS[method].follows_training


def test_a_missing_file_and_a_missing_function_are_named(run, make_run, influence, tmp_path):
    refused(
        influence("score", run, "--candidates", "rows.csv"),
        2,
        "--candidates rows.csv: no such file",
    )
    path = write_candidates(run, tmp_path / "rows.jsonl", [0])
    refused(
        influence("self", make_run(), "--candidates", path),
        2,
        f"--candidates {path} needs example(row)",
    )
