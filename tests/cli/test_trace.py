"""influence trace: scores over training time, as a table and as a plot."""

import pytest
import torch

from tests.refusals import refused
from tests.training import expected, train


@pytest.fixture
def run(tmp_path):
    return train(tmp_path / "run", every=4, batches=lambda t: [t % 5, 3, 3, 9])


def test_each_step_has_the_sum_of_its_entries_and_each_example_its_occurrences(run, influence):
    result = influence("trace", run, "--queries", "1,3", "--train", "3,7")
    assert result.code == 0, result.err
    assert list(result.rows[0]) == [
        "query",
        "train",
        "step",
        "score",
        "running",
        "query_label",
        "train_label",
    ]
    wanted = expected(run)
    for query in (1, 3):
        rows = [row for row in result.rows if row["query"] == str(query)]
        whole = [float(row["score"]) for row in rows if row["train"] == "all"]
        assert whole == pytest.approx([float(scores[:, query].sum()) for _, _, scores in wanted])
        third = {int(row["step"]): float(row["score"]) for row in rows if row["train"] == "3"}
        assert third == pytest.approx(
            {s: float(v[torch.tensor(ids) == 3, query].sum()) for s, ids, v in wanted if 3 in ids}
        )
        assert not [row for row in rows if row["train"] == "7"]  # never trained on
        last = [row for row in rows if row["train"] == "all"][-1]
        assert float(last["running"]) == pytest.approx(sum(whole))


def test_both_forms_and_all_queries_as_one_agree(run, influence):
    query, embedding = (
        [float(row["score"]) for row in influence("trace", run, "--form", form).rows]
        for form in ("query", "embedding")
    )
    assert embedding == pytest.approx(query, rel=1e-8, abs=1e-12)
    mean = influence("trace", run, "--sum-queries")
    assert {row["query"] for row in mean.rows} == {"all"}
    assert [float(row["score"]) for row in mean.rows] == pytest.approx(
        torch.tensor(query, dtype=torch.float64).view(5, 12).mean(0).tolist()
    )


def test_a_plot_shows_the_extremes_the_steps_and_whose_it_is(run, influence):
    result = influence("trace", run, "--queries", "1", "--train", "3", "--format", "plot")
    assert result.code == 0, result.err
    rows = influence("trace", run, "--queries", "1").rows
    most = max(float(row["score"]) for row in rows)
    for text in ("query 1", "every step", "train 3", "step 0", "step 11", f"{most:.4g}", "█"):
        assert text in result.out


def test_a_table_in_parquet_has_whole_steps(run, influence, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    for command, flags in (("trace", ()), ("score", ("--method", "dve", "--by", "step"))):
        assert influence(command, run, *flags, "-o", tmp_path / "out.parquet").code == 0
        table = pq.read_table(tmp_path / "out.parquet")
        assert set(table["step"].to_pylist()) <= {*range(12), *map(str, range(12))}


def test_what_has_no_place_in_training_time_is_refused(run, influence, tmp_path):
    refused(
        influence("trace", run, "--method", "tracin"),
        2,
        "--method tracin has no scores by step of training",
        "dve",
    )
    refused(
        influence("trace", run, "--format", "plot", "-o", tmp_path / "x"),
        2,
        "--format plot is for a terminal",
    )
    refused(influence("trace", run, "--format", "film"), 2, "--format film: unknown")
