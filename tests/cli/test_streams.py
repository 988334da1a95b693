"""Closed, full and undecodable streams, and flags of 5,000 digits: a clean message and the right exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from influence_cli import cli
from tests.conftest import build_run
from tests.refusals import refused

ROOT = Path(__file__).parents[2]
DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_run(tmp_path_factory.mktemp("streams") / "run")


def in_shell(arguments: str, run: Path) -> subprocess.CompletedProcess:
    """`influence ARGUMENTS` in a shell, with its redirections."""
    command = f"{sys.executable} -m influence_cli {arguments}".replace("RUN", str(run))
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, cwd=ROOT, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "says"), [
    ("score RUN --queries 0 --top 1 >&-", 1, "error: stdout is closed"),
    ("score RUN --queries 0 --top 1 >/dev/full", 1, "error: stdout can't be written"),
    ("methods >/dev/full", 1, "error: stdout can't be written"),
    ("--help >/dev/full", 1, "error: stdout can't be written"),
    ("inspect RUN >/dev/full", 1, "error: stdout can't be written"),
    ("score RUN --queries - <&-", 2, "error: --queries -: no ids"),
    ("score RUN --queries - < <(printf '0\\n\\xff')", 2, "error: --queries"),
    ("score RUN --queries 0 --top 1 2>&-", 0, ""),
    ("score RUN --queries 0 --top 1 2>/dev/full", 0, ""),
    ("merge - <&-", 1, "error: - can't be read"),
])  # fmt: skip
def test_a_stream_that_is_closed_full_or_no_text(arguments, code, says, run):
    done = in_shell(arguments, run)
    assert done.returncode == code, done.stderr
    assert says in done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    if not code:
        assert done.stdout.startswith(b"query,kind,rank")
        assert b"note" not in done.stdout


@pytest.mark.parametrize("flags", [
    ["--queries", DIGITS], ["--queries", f"0:{DIGITS}"], ["--train", DIGITS], ["--batch-size", "-" + DIGITS],
    ["--shard", f"{DIGITS}/2"], ["--shard", f"1/{DIGITS}0x"], ["--seed", DIGITS], ["--project", DIGITS],
    ["--project", "9" * 400], ["--project", "4", "--seed", "9" * 400], ["--steps", DIGITS], ["--steps", f"{DIGITS}:"],
    ["--top", "-" + DIGITS], ["--lr", "nan"], ["--lr", "-" + DIGITS],
], ids=lambda flags: " ".join(flags)[:24])  # fmt: skip
def test_a_number_of_many_digits_in_a_flag_is_refused(flags, run, influence):
    result = influence("score", run, *flags)
    assert result.code == 2, result.err
    assert "Traceback" not in result.err
    assert result.out == ""


@pytest.mark.parametrize("flags", [["--top", DIGITS], ["--batch-size", DIGITS]], ids=lambda f: f[0])
def test_a_number_above_every_size_means_all(flags, run, influence):
    result = influence("score", run, "--queries", "0", "--top", "20", *flags)
    assert result.code == 0, result.err
    assert len(result.rows) >= 15


def test_a_name_with_control_characters_is_shown_escaped(run, influence):
    for arguments in (
        ["score", run, "--method", "\x1b[31mred"],
        ["score", "no\x1b[31mrun"],
        ["score", run, "--\x1b[31mred"],
        ["\x1b[31mred"],
    ):
        result = influence(*arguments)
        assert result.code == 2
        assert "\x1b" not in result.err
        assert "\\x1b[31mr" in result.err.replace("\n", ""), result.err


def test_notes_and_errors_of_the_run_are_shown_escaped(tmp_path, influence):
    folder = build_run(tmp_path / "run\x1b[31m")
    (folder / "definition.py").write_text("raise ValueError('\\x1b[31m \\u202e [bold]x')")
    result = influence("score", folder)
    refused(result, 1, "\\x1b[31m \\u202e [bold]x")
    assert "\x1b" not in result.err
    assert "\u202e" not in result.err


def test_init_shows_a_folder_with_control_characters_escaped(tmp_path, influence):
    result = influence("init", tmp_path / "new\x1b[31m")
    assert result.code == 0
    assert "\x1b" not in result.err
    wrote, _, following = result.err.splitlines()
    assert wrote.endswith("new\\x1b[31m/definition.py")
    assert following.startswith("next: influence inspect") and following.endswith("new\\x1b[31m")


def test_a_stack_trace_of_debug_is_shown_escaped(tmp_path, influence):
    folder = build_run(tmp_path / "run")
    (folder / "definition.py").write_text("raise ValueError('\\x1b[31m \\u202e')")
    result = influence("score", folder, "--debug")
    assert result.code == 1
    assert "Traceback" in result.err
    assert not {"\x1b", "\u202e"} & set(result.err)
    assert "ValueError: \\x1b[31m \\u202e" in result.err


def test_a_fault_of_the_package_is_shown_escaped(capsys, monkeypatch):
    monkeypatch.setattr(cli, "app", raise_fault)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert "KeyError" in shown
    assert "\x1b" not in shown


def raise_fault() -> None:
    raise KeyError(Message())


class Message:
    def __repr__(self) -> str:
        return "\x1b[31m"
