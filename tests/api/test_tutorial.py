"""The blocks of docs/tutorial.md run in order, and print what the page shows."""

import io
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```\n\n```\n(.*?)```", PAGE, re.S)


def run_blocks() -> list[tuple[str, str]]:
    """Each block with what it prints."""
    space: dict = {"__name__": "__main__"}
    outputs = []
    for code, _ in BLOCKS:
        output = io.StringIO()
        with redirect_stdout(output):
            exec(compile(code, "docs/tutorial.md", "exec"), space)
        outputs.append((code, output.getvalue()))
    return outputs


def test_every_python_block_has_its_output():
    assert len(BLOCKS) == PAGE.count("```python") >= 10


def test_the_tutorial_prints_what_it_shows(tmp_path, monkeypatch):
    pytest.importorskip("pandas", reason="pandas is not installed")
    ignored = shutil.ignore_patterns(".influence", "__pycache__")
    shutil.copytree(ROOT / "sample_runs" / "digits", tmp_path / "sample_runs" / "digits", ignore=ignored)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert run_blocks() == BLOCKS
