"""The commands of a page do what it shows. `python -m tests.integrations.test_transcripts [PAGE ...]` writes the pages
again, with what the commands print."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.integrations import hf_runs

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / name for name in ("huggingface.md", "index.md")]
PAGES += sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"<!-- run: (\w+) -->\n```\n(.*?)```\n", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")
SECONDS = re.compile(r", \d+\.\d+ s\b")


def digits(folder: Path) -> Path:
    """A copy of the sample run, without a cache."""
    ignored = shutil.ignore_patterns(".influence", "__pycache__")
    sample = Path("sample_runs", "digits")
    shutil.copytree(ROOT / sample, folder / sample, ignore=ignored)
    return folder


HUGGING_FACE = hf_runs.RUNS | hf_runs.TUTORIAL
RUNS = HUGGING_FACE | {"digits": digits}
CASES = [
    (page, name)
    for page in PAGES
    for name in dict.fromkeys(name for name, _ in BLOCK.findall(page.read_text(encoding="utf-8")))
]


def list_commands(block: str) -> list[str]:
    return [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]


def run_shell(command: str, folder: Path, text: str = "") -> str:
    ended = subprocess.run(
        ["sh", "-c", command], cwd=folder, input=text, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def run_command(command: str, folder: Path) -> str:
    program, _, rest = command.partition(" | ")
    if shlex.split(program)[0] != "influence":
        return run_shell(command, folder)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "influence_cli", *shlex.split(program)[1:]]
    ended = subprocess.run(
        arguments,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout
    return run_shell(rest, folder, ended.stdout) if rest else ended.stdout


def run_block(block: str, folder: Path) -> str:
    return "".join(
        f"$ {command}\n{run_command(command, folder)}" for command in list_commands(block)
    )


def make_run(name: str, folder: Path) -> None:
    """In a process of its own, because transformers sets up torch."""
    if name not in HUGGING_FACE:
        RUNS[name](folder)
        return
    subprocess.run(
        [sys.executable, "-m", "tests.integrations.hf_runs", name, str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, check=True, capture_output=True,
    )  # fmt: skip


def tidy(text: str) -> str:
    """Without spaces at the ends of lines."""
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def test_the_guide_shows_every_run():
    assert [name for page, name in CASES if page.name == "huggingface.md"] == list(hf_runs.RUNS)


def call_in_process(command: str, influence) -> str:
    """In this process, because it has imported transformers already."""
    program, _, rest = command.partition(" | ")
    if shlex.split(program)[0] != "influence":
        return run_shell(command, Path.cwd())
    result = influence(*shlex.split(program)[1:])
    assert result.code == 0, result.err
    printed = result.err + result.out
    return run_shell(rest, Path.cwd(), printed) if rest else printed


@pytest.mark.parametrize(
    ("page", "name"), CASES, ids=[f"{page.stem}-{name}" for page, name in CASES]
)
def test_the_page_shows_what_the_commands_print(page, name, tmp_path, influence, monkeypatch):
    folder = RUNS[name](tmp_path / name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))
    for run, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if run != name:
            continue
        commands = list_commands(block)
        printed = "".join(
            f"$ {command}\n{call_in_process(command, influence)}" for command in commands
        )
        shown, printed = SECONDS.sub("", block), SECONDS.sub("", printed)
        assert NUMBER.sub("0.0", printed).split() == NUMBER.sub("0.0", shown).split()
        for number, measured in zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True):
            assert float(measured) == pytest.approx(float(number), rel=0.01)  # processors round


def write_page(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as place:
        for name in {name for name, _ in BLOCK.findall(text)}:
            make_run(name, Path(place) / name)
        text = BLOCK.sub(
            lambda match: (
                f"<!-- run: {match[1]} -->\n```\n{tidy(run_block(match[2], Path(place) / match[1]))}```\n"
            ),
            text,
        )
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for page in map(Path, sys.argv[1:] or PAGES):
        write_page(page)
