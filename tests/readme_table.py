"""Compares the first table of README.md with what an installed `influence` prints.

    python tests/readme_table.py PROGRAM

It runs the program in an empty folder, on a copy of sample_runs/digits. Needs only Python.
"""

import math
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN = Path("sample_runs", "digits")
TERMINAL = ["--format", "table"]  # the README shows what a terminal gets


def read_first_transcript() -> tuple[list[str], str]:
    """Arguments of `influence` and their output, as README.md shows them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    transcript = re.search(r"```\n\$ influence (.*)\n((?s:.*?))```", text)
    assert transcript is not None, "README.md has no transcript of influence"
    return transcript[1].split(), transcript[2]


def same_number(first: str, second: str) -> bool:
    """The last digits depend on the machine's arithmetic."""
    try:
        return math.isclose(float(first), float(second), rel_tol=1e-4)
    except ValueError:
        return False


def same_table(first: str, second: str) -> bool:
    lines = [[line.split() for line in text.splitlines()] for text in (first, second)]
    return [len(cells) for cells in lines[0]] == [len(cells) for cells in lines[1]] and all(
        a == b or same_number(a, b)
        for row, other in zip(*lines, strict=True)
        for a, b in zip(row, other, strict=True)
    )


def find_difference(program: str, folder: Path) -> str | None:
    """What differs from README.md; None if nothing does. Copies the sample run into `folder`."""
    arguments, expected = read_first_transcript()
    shutil.copytree(ROOT / RUN, folder / RUN, ignore=shutil.ignore_patterns(".influence"))
    command = [program, *arguments, *TERMINAL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        return f"exit {done.returncode}: {done.stderr}"
    if not same_table(done.stdout, expected):
        return f"README.md:\n{expected}\n{program}:\n{done.stdout}"
    return None


def main() -> None:
    program = str(Path(sys.argv[1]).absolute())  # a link to the program keeps its own environment
    with tempfile.TemporaryDirectory() as folder:
        difference = find_difference(program, Path(folder))
    if difference is not None:
        sys.exit(f"the table of README.md differs\n{difference}")
    print(f"{program} prints the table of README.md")


if __name__ == "__main__":
    main()
