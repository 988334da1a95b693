"""influence evaluate RUN lds|deletion FILE: scores of any tool against the same trainings."""

import pytest

from tests.refusals import refused
from tests.training import train

FLAGS = {"lds": ("--subsets", "4"), "deletion": ("--top-k", "2,5")}


@pytest.fixture
def run(tmp_path):
    return train(tmp_path / "run", every=6, rate=0.5)


def write_scores(influence, run, file):
    result = influence("score", run, "--lr", "0.3", "--top", "all", "-o", file)
    assert result.code == 0, result.err


@pytest.mark.parametrize("protocol", FLAGS)
def test_the_file_of_a_method_has_its_figures(protocol, run, tmp_path, influence):
    file = tmp_path / "scores.csv"
    write_scores(influence, run, file)
    flags = (*FLAGS[protocol], "--method", "tracin", "--lr", "0.3", "--by", "query")
    result = influence("evaluate", run, protocol, file, *flags)
    assert result.code == 0, result.err
    figures: dict[str, dict[tuple[str, str], float]] = {}
    for row in result.rows:
        figures.setdefault(row["method"], {})[row["figure"], row["query"]] = float(row["value"])
    assert figures[str(file)] == pytest.approx(figures["tracin"], abs=1e-12)
    assert figures["tracin"]


def test_without_a_method_only_the_file_is_evaluated(run, tmp_path, influence):
    file = tmp_path / "scores.csv"
    write_scores(influence, run, file)
    rows = influence("evaluate", run, "lds", file, *FLAGS["lds"]).rows
    assert {row["method"] for row in rows} == {str(file), "retraining"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("query,train,score\n0,0,1\n", "has no score of query 0 and training example 1"),
        ("query,train,score\n3,0,1\n", "has no scores of query 0"),
        ("query,train,score\n0,24,1\n", "query 0 has a score of '24'"),
        ("query,train,score\n0,sports,1\n", "query 0 has a score of 'sports'"),
    ],
    ids=["pair", "query", "id", "group"],
)
def test_a_file_without_the_pairs_is_refused(text, line, run, tmp_path, influence):
    file = tmp_path / "scores.csv"
    file.write_text(text)
    command = ("evaluate", run, "lds", file, "--queries", "0", *FLAGS["lds"])
    refused(influence(*command), 2, f"{file} {line}" if "has no" in line else f"{file}: {line}")
    assert not (run / ".influence" / "evaluate").exists()  # before any training


def test_protocols_without_score_files_refuse_them(run, tmp_path, influence):
    file = tmp_path / "scores.csv"
    refused(influence("evaluate", run, "tsloo", file), 2, "tsloo takes no score files")
