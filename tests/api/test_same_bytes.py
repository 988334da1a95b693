"""The Python API and the command line give the same bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence_cli import open_run
from tests.cli.test_ad_hoc_queries import query_row, write_rows
from tests.cli.test_candidates import WITH_IDS, train_row, write_candidates
from tests.conftest import build_run
from tests.methods.test_tracin_we import DEFINITION as TEXTS
from tests.training import train

# name: the run, the flags of `score`, the arguments of `InfluenceRun.score`
SCORES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "defaults": ("plain", "", {}),
    "ids in a list": ("plain", "--queries 1,3 --top 2", {"queries": [3, 1], "top": 2}),
    "one id, and a range": (
        "plain", "--queries 4 --train 2:15", {"queries": 4, "train": range(2, 15)},
    ),
    "ids in an array": (
        "plain", "--train 1,5,7 --top all", {"train": np.array([7, 5, 1, 5]), "top": "all"},
    ),
    "ids as text": ("plain", "--queries 0,2:4", {"queries": "0,2:4"}),
    "all pairs by layer": ("plain", "--by layer --top all", {"by": "layer", "top": "all"}),
    "by checkpoint": ("plain", "--by checkpoint", {"by": "checkpoint"}),
    "groups": ("plain", "--group-by label --top all", {"group_by": "label", "top": "all"}),
    "cosines of a sum": (
        "plain", "--normalize --sum-queries", {"normalize": True, "sum_queries": True},
    ),
    "votes of layers": ("plain", "--aggregate vote:3", {"aggregate": "vote:3"}),
    "one rate, one step": (
        "plain", "--lr 0.5 --steps 20", {"lr": 0.5, "steps": 20},
    ),
    "two steps, no rates": (
        "plain", "--lr-weights none --steps 10,20", {"lr_weights": "none", "steps": [10, 20]},
    ),
    "layers": ("plain", "--layers 0 --layers !*bias", {"layers": ["0", "!*bias"]}),
    "a shard": ("plain", "--shard 2/3 --top all", {"shard": "2/3", "top": "all"}),
    "grad-cos": ("plain", "--method grad-cos", {"method": "grad-cos"}),
    "influence": (
        "plain",
        "--method influence --curvature kfac --damping 0.1",
        {"method": "influence", "curvature": "kfac", "damping": 0.1},
    ),
    "random": ("plain", "--method random", {"method": "random"}),
    "dve": ("trained", "--method dve --by step", {"method": "dve", "by": "step"}),
    "unroll": ("trained", "--method unroll --replay", {"method": "unroll", "replay": True}),
    "words": (
        "texts", "--method tracin-we --by word", {"method": "tracin-we", "by": "word"},
    ),
    "words of all pairs": (
        "texts",
        "--method tracin-we --by word --top-words 4 --top all",
        {"method": "tracin-we", "by": "word", "top_words": 4, "top": "all"},
    ),
}  # fmt: skip
SELF: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("", {}),
    "all by loss": ("--top all --sort loss", {"top": "all", "sort": "loss"}),
    "ranks of layers": ("--aggregate rank --train 0:9", {"aggregate": "rank", "train": range(9)}),
    "influence": (
        "--method influence --curvature fisher", {"method": "influence", "curvature": "fisher"},
    ),
    "a shard": ("--shard 2/3 --lr-weights none", {"shard": "2/3", "lr_weights": "none"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    return {
        "plain": build_run(place / "plain", WITH_IDS),
        "trained": train(place / "trained", every=4),
        "texts": build_run(place / "texts", TEXTS),
    }


def compare(influence, capfd, command: str, table, flags: list[Any], place: Path, form="csv"):
    """The table as the API writes it, and as the command line writes it into the same cache."""
    assert capfd.readouterr() == ("", "")
    name = place / f"table.{form}"
    table.write(name)
    written = name.read_bytes(), json.loads((place / f"{name.name}.meta.json").read_text())
    result = influence(command, *flags, "-o", name)
    assert result.code == 0, result.err
    record = json.loads((place / f"{name.name}.meta.json").read_text())
    assert written[0] == name.read_bytes()
    for key in ("request", "shard", "top", "versions", "bytes", "sha256"):
        assert written[1][key] == record[key]
    notes = [line.removeprefix("note: ") for line in result.err.splitlines()]
    assert len(notes) == len(table.notes)


@pytest.mark.parametrize("case", SCORES)
def test_score_writes_the_bytes_of_the_command_line(case, runs, influence, capfd, tmp_path):
    name, flags, arguments = SCORES[case]
    scores = open_run(runs[name], cache=tmp_path / "a").score(**arguments)
    command = [runs[name], "--cache", tmp_path / "b", *flags.split()]
    compare(influence, capfd, "score", scores, command, tmp_path)


@pytest.mark.parametrize("case", SELF)
def test_self_writes_the_bytes_of_the_command_line(case, runs, influence, capfd, tmp_path):
    flags, arguments = SELF[case]
    table = open_run(runs["plain"], cache=tmp_path / "a").self_influence(**arguments)
    command = [runs["plain"], "--cache", tmp_path / "b", *flags.split()]
    compare(influence, capfd, "self", table, command, tmp_path)


@pytest.mark.parametrize("form", ["tsv", "jsonl"])
def test_the_ending_of_the_name_chooses_the_format(form, runs, influence, capfd, tmp_path):
    scores = open_run(runs["plain"], cache="none").score()
    command = [runs["plain"], "--cache", "none"]
    compare(influence, capfd, "score", scores, command, tmp_path, form)


def test_a_parquet_file_has_the_rows_and_the_record(runs, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    scores = open_run(runs["plain"], cache="none").score()
    scores.write(tmp_path / "table.parquet")
    table = pq.read_table(tmp_path / "table.parquet")
    assert table.to_pylist() == [row._asdict() for row in scores.rows()]
    assert json.loads(table.schema.metadata[b"influence"]) == scores.made


@pytest.mark.parametrize("labelled", [True, False])
def test_given_queries_have_the_bytes_of_the_command_line(
    labelled, runs, influence, capfd, tmp_path
):
    run, plain = runs["plain"], open_run(runs["plain"], cache="none")
    rows = [query_row(run, number, labelled) for number in (2, 0)]
    given = plain.score(query=rows, top=3)
    flags = [run, "--cache", "none", "--top", "3"]
    texts = [word for row in rows for word in ("--query", json.dumps(row))]
    compare(influence, capfd, "score", given, [*flags, *texts], tmp_path)
    path = write_rows(run, tmp_path / "rows.jsonl", [2, 0], labelled)
    of_file = plain.score(query_file=path, top=3)
    compare(influence, capfd, "score", of_file, [*flags, "--query-file", path], tmp_path)
    of_list = plain.score(query_file=rows, top=3)
    assert of_list.rows() == of_file.rows() == given.rows()


def test_candidates_have_the_bytes_of_the_command_line(runs, influence, capfd, tmp_path):
    run, plain = runs["plain"], open_run(runs["plain"], cache="none")
    path = write_candidates(run, tmp_path / "rows.jsonl", [7, 3, 11])
    flags = [run, "--cache", "none", "--candidates", path]
    scores = plain.score(candidates=path)
    compare(influence, capfd, "score", scores, flags, tmp_path)
    table = plain.self_influence(candidates=path)
    compare(influence, capfd, "self", table, flags, tmp_path)
    rows = [train_row(run, number) for number in (7, 3, 11)]
    assert plain.score(candidates=rows).rows() == scores.rows()


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "float64"},
        {"store": "float16"},
        {"project": 8, "seed": 3, "projection": "sparse"},
        {"batch_size": 4, "verify": True},
    ],
    ids=str,
)
def test_arguments_of_open_run_are_flags(arguments, runs, influence, capfd, tmp_path):
    scores = open_run(runs["plain"], cache=tmp_path / "a", **arguments).score()
    flags = []
    for name, value in arguments.items():
        flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [runs["plain"], "--cache", tmp_path / "b", *flags]
    compare(influence, capfd, "score", scores, command, tmp_path)


def list_files(folder: Path) -> dict[str, bytes]:
    """The gradients in a cache: file name -> content."""
    paths = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_cache_stores_the_bytes_of_the_command_line(runs, influence, tmp_path):
    run = open_run(runs["plain"], cache=tmp_path / "a")
    arguments = {"train": range(4, 20), "queries": [0, 2], "layers": "2"}
    assert run.cache(**arguments) == [("query", 4, 0), ("train", 32, 0)]
    flags = ("--train", "4:20", "--queries", "0,2", "--layers", "2")
    influence("cache", runs["plain"], "--cache", tmp_path / "b", *flags)
    assert list_files(tmp_path / "a") == list_files(tmp_path / "b") != {}
    assert run.cache(**arguments) == [("query", 0, 4), ("train", 0, 32)]


def test_scores_read_a_cache_of_the_command_line(runs, influence, tmp_path):
    influence("cache", runs["plain"], "--cache", tmp_path / "cache")
    files = list_files(tmp_path / "cache")
    open_run(runs["plain"], cache=tmp_path / "cache").score()
    assert list_files(tmp_path / "cache") == files
