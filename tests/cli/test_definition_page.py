"""The commands of docs/definition.md run as they are written, from an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "definition.md").read_text(), re.S)
FIRST, LAST = (text for language, text in BLOCKS if language == "sh")
DEFINITION, TRAIN = (text for language, text in BLOCKS if language == "python")


@pytest.fixture
def shell(tmp_path):
    """Runs lines of a shell in an empty folder, with `influence` and `python` on the path."""
    folder, programs = tmp_path / "empty", tmp_path / "bin"
    folder.mkdir()
    programs.mkdir()
    for name, command in (("python", ""), ("influence", "-m influence_cli")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {command} "$@"\n')
        (programs / name).chmod(0o755)
    path = os.pathsep.join((str(programs), os.environ["PATH"]))
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(lines: str) -> Path:
        command = ["sh", "-e", "-c", lines]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder

    run.folder = folder
    return run


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
