"""What a table of the Python API holds: rows, a matrix, a DataFrame, and how it was made."""

import sys

import numpy as np
import pytest

import influence_cli
from influence_cli import InfluenceError, open_run
from influence_cli.errors import UsageProblem
from tests.conftest import build_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return open_run(build_run(tmp_path_factory.mktemp("tables") / "run"), cache="none")


@pytest.mark.parametrize("name", ["score", "self_influence"])
def test_rows_have_the_names_of_the_columns(name, run):
    table = getattr(run, name)()
    rows = table.rows()
    assert rows[0]._fields == table.columns
    assert rows[0].score == rows[0][table.columns.index("score")]
    assert isinstance(rows[0].train, int)


def test_a_matrix_has_the_score_of_every_pair(run):
    scores = run.score(queries=[1, 4], train=[3, 9, 2, 11], top="all")
    matrix = scores.matrix()
    assert matrix.shape == (2, 4)
    assert scores.query_ids.tolist() == [1, 4]
    assert scores.train_ids.tolist() == [2, 3, 9, 11]
    rows = scores.rows()
    assert len(rows) == 8
    for row in rows:
        at = scores.query_ids.tolist().index(row.query), scores.train_ids.tolist().index(row.train)
        assert matrix[at] == row.score


@pytest.mark.parametrize("by", ["layer", "checkpoint"])
def test_a_matrix_holds_the_sums_of_parts(by, run):
    scores = run.score(top="all", by=by)
    sums: dict = {}
    for row in scores.rows():
        sums[row.query, row.train] = sums.get((row.query, row.train), 0) + row.score
    expected = [[sums[query, train] for train in range(20)] for query in range(6)]
    np.testing.assert_allclose(scores.matrix(), expected, rtol=1e-9)


def test_a_matrix_of_groups_and_of_all_queries(run):
    plain = run.score(top="all").matrix()
    summed = run.score(top="all", sum_queries=True)
    assert summed.query_ids.tolist() == ["all"]
    np.testing.assert_allclose(summed.matrix(), plain.mean(0, keepdims=True), rtol=1e-4, atol=1e-7)
    grouped = run.score(top="all", group_by="label")
    assert grouped.train_ids.tolist() == ["a", "b", "c"]
    assert grouped.matrix().shape == (6, 3)
    np.testing.assert_allclose(grouped.matrix().sum(1), plain.sum(1), rtol=1e-4, atol=1e-6)


def test_a_matrix_of_an_empty_shard(run):
    shapes = [run.score(top="all", shard=f"{i}/3").matrix().shape for i in (1, 2, 3)]
    assert sorted(shapes) == [(6, 0), (6, 0), (6, 20)]


def test_a_top_has_no_matrix(run):
    with pytest.raises(UsageProblem) as error:
        run.score(top=3).matrix()
    assert str(error.value) == (
        "matrix() needs the scores of all pairs, and top=3 keeps some of them\n"
        "  expected: run.score(..., top='all')"
    )


@pytest.mark.parametrize("name", ["score", "self_influence"])
def test_a_data_frame_has_the_rows(name, run):
    pytest.importorskip("pandas", reason="pandas is not installed")
    table = getattr(run, name)()
    frame = table.to_pandas()
    assert tuple(frame.columns) == table.columns
    assert list(frame.itertuples(index=False, name=None)) == [tuple(row) for row in table.rows()]
    assert frame["score"].dtype == np.float64
    assert frame["train"].dtype == np.int64


def test_a_missing_pandas_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InfluenceError) as error:
        run.score().to_pandas()
    assert str(error.value) == "to_pandas() needs pandas\n  pip install pandas"


def test_a_table_says_how_it_was_made(run):
    made = run.score(queries=[1], method="grad-dot", train=np.arange(5)).made
    (call,) = made["command"]
    assert call.startswith(f"open_run(run='{run.path}', cache='none').score(method='grad-dot', ")
    assert "queries=[1]" in call
    assert made["versions"]["influence"] == influence_cli.__version__
    assert made["request"]["method"] == "grad-dot"
    assert made["request"]["train"] == "0:5"
    assert made["top"] == 10
    assert "self_influence(" in run.self_influence().made["command"][0]


def test_a_run_and_a_table_have_short_names(run):
    assert repr(run) == f"open_run(run='{run.path}', cache='none')"
    assert repr(run.self_influence()).startswith("<open_run(")
    assert run.steps == [10, 20]
