"""The commands of docs/definition.md run as they are written, from an empty folder."""

import re
import runpy
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from faults.forks import ForkedCommand
from tests.forked import run_fork

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "definition.md").read_text(), re.S)
FIRST, LAST = (text for language, text in BLOCKS if language == "sh")
DEFINITION, TRAIN = (text for language, text in BLOCKS if language == "python")


@pytest.fixture
def shell(tmp_path):
    """Runs lines of a shell in an empty folder: `influence` and `python` are forks."""
    folder = tmp_path / "empty"
    folder.mkdir()

    def run(lines: str) -> Path:
        for line in lines.splitlines():
            words, _, file = line.partition("#")[0].partition(">")
            program, *arguments = words.split()
            if program == "python":
                ended = ForkedCommand([], folder, main=partial(run_script, *arguments)).wait()
            else:
                assert program == "influence"
                ended = run_fork(*arguments, place=folder)
            assert ended.code == 0, ended.err
            if file:
                (folder / file.strip()).write_text(ended.out)
        return folder

    run.folder = folder
    return run


def run_script(path: str) -> None:
    sys.path.insert(0, "")
    runpy.run_path(path, run_name="__main__")


def test_the_commands_run_in_an_empty_folder(shell):
    (shell.folder / "train.py").write_text(TRAIN)
    shell(FIRST)
    folder = shell(LAST)
    assert len(list((folder / "fashion" / "checkpoints").glob("step-*.safetensors"))) == 5
    assert len((folder / "scores.csv").read_text().splitlines()) == 1 + 5 * 2 * 2


def test_the_definition_of_the_page_trains_and_scores(shell):
    rng = np.random.default_rng(0)
    arrays = {
        f"{letter}_{split}": rng.integers(0, 10, (64, *shape), dtype=np.uint8)
        for split in ("train", "test")
        for letter, shape in (("x", (28, 28)), ("y", ()))
    }
    np.savez(shell.folder / "fashion_mnist.npz", **arrays)
    (shell.folder / "fashion").mkdir()
    (shell.folder / "fashion" / "definition.py").write_text(DEFINITION)
    (shell.folder / "train.py").write_text(TRAIN)
    folder = shell("python train.py\ninfluence score fashion --queries 0 --top 2 > scores.csv")
    rows = (folder / "scores.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2
    labels = {row.split(",")[6] for row in rows[1:]}
    names = re.search(r'NAMES = "(.*)"', DEFINITION)
    assert names is not None
    assert labels <= set(re.findall(r"\S+", names[1]))
