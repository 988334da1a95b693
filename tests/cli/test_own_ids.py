"""Columns of the user's own ids: where they stand, what they hold, and that merge takes them."""

import json

import pytest

from tests.conftest import DEFINITION, build_run
from tests.refusals import refused

WITH_IDS = (
    DEFINITION
    + """
def id(example):
    number = round(float(example[0][0]) * 1000)
    return None if number % 5 == 0 else f"row {number}"
"""
)
SCORE_HEAD = "query,kind,rank,train,score,query_label,train_label,query_text,train_text"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return build_run(tmp_path_factory.mktemp("ids") / "run", WITH_IDS)


def own_ids(name: str) -> list[str]:
    space: dict = {"__name__": "definition_of_a_test"}
    exec(WITH_IDS, space)
    return [space["id"](example) or "" for example in space[name]()]


def test_score_ends_in_both_ids(run, influence):
    result = influence("score", run, "--top", "all")
    assert result.out.splitlines()[0] == f"{SCORE_HEAD},query_id,train_id"
    queries, train = own_ids("query_data"), own_ids("train_data")
    assert "" in queries + train
    assert len(result.rows) == 120
    for row in result.rows:
        assert row["query_id"] == queries[int(row["query"])]
        assert row["train_id"] == train[int(row["train"])]


def test_parts_have_the_ids_of_their_pair(run, influence):
    result = influence("score", run, "--by", "layer", "--queries", "1", "--top", "2")
    head = SCORE_HEAD.replace("train,", "train,layer,", 1)
    assert result.out.splitlines()[0] == f"{head},query_id,train_id"
    train = own_ids("train_data")
    assert [row["train_id"] for row in result.rows] == [
        train[int(row["train"])] for row in result.rows
    ]
    assert {row["query_id"] for row in result.rows} == {own_ids("query_data")[1]}


@pytest.mark.parametrize(
    ("flag", "empty", "filled"),
    [
        (["--sum-queries"], "query_id", "train_id"),
        (["--group-by", "label"], "train_id", "query_id"),
    ],
)
def test_a_sum_has_no_id(run, influence, flag, empty, filled):
    rows = influence("score", run, *flag).rows
    assert {row[empty] for row in rows} == {""}
    assert len({row[filled] for row in rows}) > 1


def test_self_ends_in_the_training_id(run, influence):
    result = influence("self", run, "--top", "all")
    assert result.out.splitlines()[0] == "rank,train,score,loss,train_label,train_text,train_id"
    train = own_ids("train_data")
    assert all(row["train_id"] == train[int(row["train"])] for row in result.rows)


def test_a_definition_without_ids_has_no_columns_of_them(make_run, influence):
    assert influence("score", make_run(), "--top", "1").out.splitlines()[0] == SCORE_HEAD


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("command", [["score", "--top", "3"], ["self", "--top", "3"]])
def test_merge_keeps_ids(run, influence, tmp_path, command, suffix):
    name, *flags = command
    part = tmp_path / f"part.{suffix}"
    whole = influence(name, run, *flags)
    assert influence(name, run, *flags, "-o", part).code == 0
    assert influence("merge", part, "--top", "3").out == whole.out


def test_merge_adds_up_parts_of_pairs_with_ids(run, influence, tmp_path):
    part = tmp_path / "part.csv"
    whole = influence("score", run, "--by", "layer", "--top", "3")
    influence("score", run, "--by", "layer", "--top", "3", "-o", part)
    assert influence("merge", part, "--top", "3").out == whole.out


def test_jsonl_holds_ids_as_texts(run, influence):
    rows = [
        json.loads(line) for line in influence("self", run, "--format", "jsonl").out.splitlines()
    ]
    assert all(isinstance(row["train_id"], str) for row in rows)


def test_an_id_that_fails_is_an_error_of_the_definition(make_run, influence):
    run = make_run(definition=DEFINITION + "\ndef id(example):\n    return example['name']\n")
    refused(influence("self", run), 1, "id() in definition.py raised", "return example['name']")
