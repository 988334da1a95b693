"""Golden tables through the real command in a process of its own, stdout and stderr apart; pipes, files, formats."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_model

from tests.forked import run_fork

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / "sample_runs" / "digits"

GOLDEN = """\
query,kind,rank,train,score,query_label,train_label,query_text,train_text
57,proponent,1,387,139.282,1,1,,
57,proponent,2,641,133.846,1,1,,really a 9
57,opponent,1,1204,-172.759,1,9,,really a 1
57,opponent,2,407,-121.773,1,7,,really a 1
"""
GOLDEN_PARTS = """\
query,kind,rank,train,layer,score,query_label,train_label,query_text,train_text
57,proponent,1,387,0,108.053,1,1,,
57,proponent,1,387,2,31.2284,1,1,,
57,opponent,1,1204,0,-122.718,1,9,,really a 1
57,opponent,1,1204,2,-50.0404,1,9,,really a 1
"""
GOLDEN_SELF = """\
rank,train,score,loss,train_label,train_text
1,407,420.193,3.90471,7,really a 1
2,844,407.785,5.73886,3,really a 4
3,729,381.882,8.08636,6,really a 3
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    shutil.copytree(DIGITS, folder, ignore=shutil.ignore_patterns(".influence", "__pycache__"))
    return folder


def shell(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "influence_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def rounded(table: str) -> list[list[str]]:
    """Scores to six digits: the last ones depend on the machine's arithmetic."""
    head, *rows = csv.reader(io.StringIO(table))
    floats = {"score", "loss"}
    return [
        head,
        *(
            [
                f"{float(cell):.4g}" if name in floats else cell
                for name, cell in zip(head, row, strict=True)
            ]
            for row in rows
        ),
    ]


@pytest.mark.parametrize(
    ("arguments", "golden"),
    [
        (["score", "--queries", "57", "--top", "2"], GOLDEN),
        (["score", "--queries", "57", "--top", "1", "--by", "layer"], GOLDEN_PARTS),
        (["self", "--top", "3"], GOLDEN_SELF),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_golden_tables(arguments, golden, digits, tmp_path):
    result = run_fork(arguments[0], digits, *arguments[1:], place=tmp_path)
    assert (result.code, result.err) == (0, "")
    assert rounded(result.out) == rounded(golden)
    assert "\r" not in result.out


def test_self_influence_puts_the_flipped_labels_first(digits, influence):
    flipped = {int(index) for index in json.loads((DIGITS / "flipped.json").read_text())}
    highest = [int(row["train"]) for row in influence("self", digits, "--top", 40).rows]
    assert set(highest[:10]) <= flipped
    assert len(set(highest) & flipped) >= 35


def test_the_shipped_run_is_small():
    files = [
        path
        for path in DIGITS.rglob("*")
        if path.is_file() and not {".influence", "__pycache__"} & set(path.parts)
    ]
    assert sum(path.stat().st_size for path in files) < 2_000_000


def test_a_closed_pipe_ends_quietly(digits):
    command = f"{sys.executable} -m influence_cli score {digits} --queries 0:20 --top all | head -n 2; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines()[2] == "0"
    assert result.stderr == ""


def test_what_the_definition_prints_never_reaches_the_table(digits, tmp_path, influence):
    shutil.copytree(digits, tmp_path / "noisy")
    definition = tmp_path / "noisy" / "definition.py"
    definition.write_text(
        "print('loading')\n"
        + definition.read_text().replace(
            "    return model(batch[0])", "    print('loss')\n    return model(batch[0])"
        )
    )
    result = influence(
        "score",
        tmp_path / "noisy",
        "--queries",
        "57",
        "--top",
        "2",
        "--cache",
        "none",
        "--train",
        "0:1300",
    )
    assert result.code == 0, result.err
    assert result.out.splitlines()[0] == GOLDEN.splitlines()[0]
    assert "loading" in result.err
    assert "loss" in result.err
    assert len(result.out.splitlines()) == 5


def test_ids_come_from_a_pipe_and_a_file(digits, tmp_path, influence):
    (tmp_path / "ids.txt").write_text("387\n1204\n")
    result = influence(
        "score", digits, "--queries", "-", "--train", f"@{tmp_path}/ids.txt", stdin="57\n"
    )
    assert [row[3] for row in csv.reader(io.StringIO(result.out))][1:] == ["387", "1204"]


def test_a_file_is_written_in_the_format_of_its_name(digits, tmp_path, influence):
    result = influence(
        "score", digits, "--queries", "57", "--top", "2", "-o", tmp_path / "out.jsonl"
    )
    assert result.code == 0, result.err
    assert result.out == ""
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["train"] for row in rows] == [387, 641, 1204, 407]


def test_inspect_shows_what_is_there(digits, influence):
    influence("cache", digits, "--queries", "57", "--steps", "600", "--quiet")
    result = influence("inspect", digits, "--queries", "57")
    assert result.code == 0, result.err
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert (
        "360 checkpoints/step-000360.safetensors 10.0 KB 0.25 trajectory.jsonl, step 360" in lines
    )
    assert "0.weight 0 32 x 64 rule factors 384 B" in lines
    assert any(line.startswith("query 1 6 6 0") for line in lines)


@pytest.mark.parametrize("template", ["classifier", "language-model"])
def test_a_template_runs_as_it_is(template, tmp_path, influence):
    assert influence("init", tmp_path, "--template", template).code == 0
    space: dict = {"__file__": str(tmp_path / "definition.py")}
    exec((tmp_path / "definition.py").read_text(), space)
    (tmp_path / "checkpoints").mkdir()
    save_model(
        space["model"](),
        str(tmp_path / "checkpoints" / "step-10.safetensors"),
        metadata={"learning_rate": "0.1"},
    )
    result = influence("score", tmp_path, "--queries", "0", "--top", "2")
    assert result.code == 0, result.err
    assert len(result.rows) >= 2
    assert result.err == ""


def test_init_never_overwrites(tmp_path, influence):
    (tmp_path / "definition.py").write_text("mine")
    result = influence("init", tmp_path)
    assert result.code == 2
    assert "is there already" in result.err
    assert (tmp_path / "definition.py").read_text() == "mine"


def test_the_readme_shows_what_the_commands_print(influence, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    shown = re.findall(
        r"```\n\$ influence ([^\n|]*)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S
    )
    assert len(shown) >= 2
    for command, expected in shown:
        result = influence(*command.split(), "--format", "table", "--cache", "none")
        found = [line.split() for line in result.out.splitlines()]
        for cells, line in zip(found, expected.splitlines(), strict=True):
            # all but the last digits, which depend on the machine's arithmetic
            same = [
                a == b or float(a) == pytest.approx(float(b), rel=1e-4)
                for a, b in zip(cells, line.split(), strict=True)
            ]
            assert all(same), (command, line)
