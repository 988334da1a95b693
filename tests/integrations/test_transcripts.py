"""The commands of docs/huggingface.md do what the page shows. `python -m tests.integrations.test_transcripts` writes
the page again."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.integrations import hf_runs

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "huggingface.md"
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```\n(.*?)```\n", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def list_commands(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def run_command(command: str, folder: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "influence_cli", *shlex.split(command)[1:]]
    done = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_block(block: str, folder: Path) -> str:
    return "".join(
        f"$ {command}\n{run_command(command, folder)}" for command in list_commands(block)
    )


def make_runs(folder: Path, names) -> None:
    for name in names:
        subprocess.run(
            [sys.executable, "-m", "tests.integrations.hf_runs", name, str(folder / name)],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
        )  # fmt: skip


def tidy(text: str) -> str:
    """Without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


@pytest.mark.parametrize("name", hf_runs.RUNS)
def test_the_page_shows_what_the_commands_print(name, tmp_path, influence, monkeypatch):
    """In this process, because it has imported transformers already."""
    blocks = [block for run, block in BLOCK.findall(PAGE.read_text()) if run == name]
    assert blocks, f"docs/huggingface.md shows no run {name}"
    folder = hf_runs.RUNS[name](tmp_path / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for block in blocks:
        printed = ""
        for command in list_commands(block):
            result = influence(*shlex.split(command)[1:])
            assert result.code == 0, result.err
            printed += f"$ {command}\n{result.err}{result.out}"
        assert NUMBER.sub("0.0", printed).split() == NUMBER.sub("0.0", block).split()
        for shown, measured in zip(NUMBER.findall(block), NUMBER.findall(printed), strict=True):
            assert float(measured) == pytest.approx(float(shown), rel=0.01)  # processors round


def write_page() -> None:
    with tempfile.TemporaryDirectory() as place:
        make_runs(Path(place), hf_runs.RUNS)
        text = BLOCK.sub(
            lambda match: (
                f"<!-- run: {match[1]} -->\n```\n{tidy(run_block(match[2], Path(place) / match[1]))}```\n"
            ),
            PAGE.read_text(),
        )
    PAGE.write_text(text)


if __name__ == "__main__":
    write_page()
