"""Each wrong argument has the message of the command line, with the name of the argument."""

import io
import re
import sys
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from influence_cli import InfluenceError, open_run
from influence_cli.api.influence_run import InfluenceRun
from influence_cli.api.python_names import ARGUMENTS, OF_OPEN_RUN, rename_flags
from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import option_texts
from influence_cli.methods.table import METHODS
from tests.cli.test_ad_hoc_queries import WITH_ROWS
from tests.conftest import build_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("arguments") / "run", WITH_ROWS)


@pytest.fixture(scope="module")
def run(folder):
    return open_run(folder, cache="none")


class Frame:
    """Iterates over the names of its columns, as a data frame does."""

    def __iter__(self):
        return iter(["text"])


# arguments of score, and the lines of the error
SCORE: list[tuple[dict[str, Any], str]] = [
    ({"method": "tracing"}, "method='tracing': unknown\n  expected: tracin, grad-dot, "),
    ({"queries": 6}, "queries=6: out of range\n  query_data() has 6 examples (0 to 5)"),
    ({"queries": [0, 9]}, "queries=9: out of range"),
    ({"queries": range(3, 8)}, "queries=7: out of range"),
    ({"queries": range(0)}, "queries: range(0, 0) has no ids\n  expected: an id, a list, a range"),
    ({"train": -1}, "train=-1: out of range\n  train_data() has 20 examples (0 to 19)"),
    ({"train": []}, "train: [] has no ids\n  expected: an id, a list, a range or an array"),
    ({"train": [1.5]}, "train: [1.5] is no list of ids\n  expected: an id, a list"),
    ({"train": [[1, 2], [3]]}, "train: [[1, 2], [3]] is no list of ids"),
    ({"train": np.array([True])}, "train: array([ True]) is no list of ids"),
    ({"train": "5:2"}, "train='5:2': an empty range"),
    ({"queries": "-"}, "queries: '-' reads stdin on the command line only\n  give a list"),
    ({"top": 0}, "top=0\n  expected: a number from 1, or all"),
    ({"top": 2.5}, 'top: found 2.5\n  expected: a number from 1, or "all"'),
    ({"by": "word"}, "by='word': the scores of tracin have no such parts\n  expected: checkpoint"),
    ({"by": 3}, "by: found 3\n  expected: a text"),
    ({"lr": 0}, "lr=0.0\n  expected: a number above 0"),
    ({"lr": "0.1"}, "lr: found '0.1'\n  expected: a number"),
    ({"lr": 0.1, "lr_weights": "none"}, "lr and lr_weights both set the weights of checkpoints"),
    ({"lr_weights": "half"}, "lr_weights='half': unknown\n  expected: point, segment, none"),
    ({"aggregate": "mean"}, "aggregate='mean': unknown\n  expected: sum, rank, vote, or vote:K"),
    ({"steps": 15}, "steps=15: no checkpoint has such a step\n  found: checkpoints of the steps 10"),
    ({"steps": [10, 1.5]}, "steps: found 1.5\n  expected: a whole number"),
    ({"steps": "last"}, "steps='last' can't be read at 'last'"),
    ({"layers": "head"}, "layers='head' matches no trained parameter or module"),
    ({"layers": ["0", 2]}, "layers: found 2\n  expected: a text"),
    ({"group_by": "names.txt"}, "group_by='names.txt': [Errno 2]"),
    ({"group_by": "label", "by": "word", "method": "tracin-we"}, "by word splits the scores of pairs, group_by sums"),
    ({"shard": "3/2"}, "shard='3/2': no such shard\n  expected: 1/2 to 2/2"),
    ({"shard": "1/2", "group_by": "label"}, "group_by sums over all training examples, shard sc"),
    ({"curvature": "ekfac"}, "curvature does not apply to method='tracin'\n  leave out curvature"),
    ({"method": "influence", "curvature": "exact"}, "curvature='exact': unknown\n  expected: "),
    ({"method": "influence", "lr": 0.1}, "lr does not apply to method='influence': it has no"),
    ({"method": "dve", "candidates": []}, "candidates does not apply to method='dve': it scores"),
    ({"method": "dve", "at": -1}, "at=-1\n  expected: a number from 0"),
    ({"method": "dve", "at": "last"}, "at: found 'last'\n  expected: a whole number"),
    ({"method": "dve", "replay": 2}, "replay: found 2\n  expected: True or False"),
    ({"method": "dve"}, "dve needs the order of training, and this run has no trajectory\n"),
    ({"methods": "dve"}, "there is no argument methods\n  the arguments are the flags"),
    ({"seed": 3}, "seed is an argument of open_run\n  open_run(..., seed=...)"),
    ({"query": "a text"}, "example 0 of query: row 0 of query: example() in definition.py raised KeyError: 'x'"),
    ({"query": [5]}, "query: row 0 is 5\n  expected: a dict of column -> value for each row"),
    ({"query": {"x": np.zeros(4)}}, "query: rows must be JSON, and Object of type ndarray"),
    ({"query": []}, "query is empty\n  expected: at least one example"),
    ({"query": ""}, "example 0 of query: row 0 of query: example() in"),
    ({"query": Frame()}, "query: found 'Frame'\n  expected: a list of rows, each a dict"),
    ({"candidates": Frame()}, "candidates: found 'Frame'\n  expected: a list of rows"),
    ({"query": "x", "queries": 0}, "queries selects among queries, and query gives them itself"),
    ({"query": "x", "query_file": "q.csv"}, "query and query_file both give queries"),
    ({"query_file": "q.csv"}, "query_file='q.csv': no such file\n  expected: a csv, tsv, jsonl"),
    ({"candidates": "c.csv"}, "candidates='c.csv': no such file"),
]  # fmt: skip
OPEN: list[tuple[dict[str, Any], str]] = [
    ({"definition": "d.py"}, "definition='{here}/d.py': no such file"),
    ({"checkpoints": "c"}, "checkpoints='{here}/c': no such folder"),
    ({"trajectory": "t.jsonl"}, "trajectory='{here}/t.jsonl': no such file"),
    ({"definition": 3}, "definition: found 3\n  expected: a path"),
    ({"cache": "none", "verify": True}, "cache='none' stores nothing, so verify has nothing to"),
    ({"cache": "none", "store": "int8"}, "cache='none' stores nothing, so store does not apply"),
    ({"device": "tpu"}, "device='tpu': unknown\n  expected: auto, cpu, cuda, cuda:N or mps"),
    ({"batch_size": 0}, "batch_size=0\n  expected: a number from 1, or auto"),
    ({"precision": "float8"}, "precision='float8': unknown\n  expected: float32, float64"),
    ({"precision": 32}, "precision: found 32\n  expected: a text"),
    ({"store": "double"}, "store='double': unknown"),
    ({"project": 0}, "project=0\n  expected: a number from 1 to 2,147,483,647; without project"),
    ({"project": 2.5}, "project: found 2.5\n  expected: a whole number"),
    ({"projection": "sparse"}, "projection sparse without project\n  project=K says how many"),
    ({"project": 4, "seed": -1}, "seed=-1\n  expected: a number from 0"),
    ({"precision": "tf32", "device": "cpu"}, "precision='tf32': cpu does not multiply in TF32"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), SCORE, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_of_score_is_named(arguments, message, run):
    with pytest.raises(InfluenceError) as error:
        run.score(**arguments)
    assert str(error.value).startswith(message)
    assert "--" not in str(error.value)


@pytest.mark.parametrize(("arguments", "message"), OPEN, ids=lambda value: str(value)[:40])
def test_a_wrong_argument_of_open_run_is_named(arguments, message, folder):
    with pytest.raises(UsageProblem) as error:
        open_run(folder, **arguments)
    assert str(error.value).startswith(message.replace("{here}", str(Path.cwd())))
    assert "--" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "dve"}, "method='dve': unknown\n  expected: tracin, grad-dot"),
        ({"sort": "rank"}, "sort='rank': unknown\n  expected: score, loss"),
        ({"sort": 1}, "sort: found 1\n  expected: a text"),
        ({"normalize": True}, "there is no argument normalize"),
        ({"aggregate": "rank", "shard": "1/2"}, "aggregate='rank' orders all training examples"),
    ],
    ids=str,
)
def test_a_wrong_argument_of_self_influence_is_named(arguments, message, run):
    with pytest.raises(UsageProblem) as error:
        run.self_influence(**arguments)
    assert str(error.value).startswith(message)


def test_cache_refuses_a_run_that_stores_nothing(run):
    with pytest.raises(UsageProblem, match="cache='none' stores nothing"):
        run.cache()


def test_no_run_no_file_no_format(run, tmp_path):
    with pytest.raises(UsageProblem, match=f"no run at {tmp_path}/none"):
        open_run(tmp_path / "none")
    scores = run.score(top=1)
    with pytest.raises(UsageProblem, match=r"path .*/no/t\.csv: its folder does not exist"):
        scores.write(tmp_path / "no" / "t.csv")
    with pytest.raises(UsageProblem, match="format='xls': unknown"):
        scores.write(tmp_path / "t.csv", format="xls")
    with pytest.raises(UsageProblem, match="safe_cells is for spreadsheets, the format is jsonl"):
        scores.write(tmp_path / "t.jsonl", safe_cells=True)


def test_stdin_is_not_read(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    for name in ("queries", "train"):
        with pytest.raises(UsageProblem, match=f"{name}: '-' reads stdin"):
            run.score(**{name: "-"})


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        (
            "choose a smaller --lr, or --lr-weights none",
            "choose a smaller lr, or lr_weights='none'",
        ),
        ("--batch-size N computes fewer", "batch_size=N computes fewer"),
        ("--nproc-per-node 2, one a device", "--nproc-per-node 2, one a device"),
        ("name another place: -o FILE", "name another place: path "),
        ("see --layers '!NAME' and --steps 10", "see layers='!NAME' and steps=10"),
    ],
)
def test_flags_become_arguments(text, renamed):
    assert rename_flags(text) == renamed


def test_an_error_keeps_its_class_and_its_cause(folder):
    with pytest.raises(InfluenceError) as error:
        open_run(folder, cache="none").score(query={"x": "no JSON"})
    assert type(error.value).__name__ == "DataError"
    assert error.value.args == (error.value.headline, *error.value.details)
    assert error.value.__cause__ is not None


def test_every_argument_has_its_name_in_messages():
    """An argument that ARGUMENTS lacks would be named as a flag."""
    calls = open_run, InfluenceRun.score, InfluenceRun.self_influence, InfluenceRun.cache
    names = {name for call in calls for name in signature(call).parameters}
    assert names - {"self", "run", "options"} <= set(ARGUMENTS)
    assert set(signature(open_run).parameters) == {"run", *OF_OPEN_RUN}


def test_every_flag_of_a_command_is_an_argument(influence):
    """Only flags of output, of the process and of the command line's own are none."""
    own = {
        "output",
        "report",
        "format",
        "safe_cells",
        "quiet",
        "debug",
        "help",
        "trajectory",
        "verify",
    }
    for command, call in {"score": InfluenceRun.score, "self": InfluenceRun.self_influence, "cache": InfluenceRun.cache}.items():  # fmt: skip
        text = influence(command, "--help").out
        flags = {
            flag.replace("-", "_") for flag in re.findall(r"^│ (?:-o, )?--([a-z-]+)", text, re.M)
        }
        options = {name for method in METHODS.values() for name in option_texts(method.options)}
        known = {*signature(call).parameters, *OF_OPEN_RUN, *options}
        assert {"train", "layers", "project"} <= flags
        assert flags - own <= known
