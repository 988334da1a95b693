"""Progress: a bar in a terminal, a plain line now and then in a log, nothing with --quiet."""

import os
import pty
import subprocess
import sys
from pathlib import Path

from influence_cli.output import stderr_reporter

ROOT = Path(__file__).parents[2]


def test_a_log_gets_a_plain_line_now_and_then(monkeypatch, capsys):
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(stderr_reporter.time, "monotonic", lambda: float(next(clock)))
    with stderr_reporter.StderrReporter().progress("gradients of train examples", 100) as advance:
        for _ in range(4):
            advance(10, "checkpoint 1 of 2")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "gradients of train examples: 20 of 100, 0.3/s, 0:04:00 left, checkpoint 1 of 2",
        "gradients of train examples: 40 of 100, 0.4/s, 0:02:30 left, checkpoint 1 of 2",
    ]


def test_a_log_gets_a_line_before_anything_is_done(monkeypatch, capsys):
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(stderr_reporter.time, "monotonic", lambda: float(next(clock)))
    with stderr_reporter.StderrReporter().progress("cg, 3 queries of 3", 100) as advance:
        advance(0, "iteration 1")
        advance(0)
    assert capsys.readouterr().err.splitlines() == [
        "cg, 3 queries of 3: 0 of 100, 0.0/s, iteration 1",
        "cg, 3 queries of 3: 0 of 100, 0.0/s",
    ]


def test_a_note_is_said_once(capsys):
    voice = stderr_reporter.StderrReporter()
    voice.note("one thing")
    voice.note("one thing")
    assert capsys.readouterr().err == "note: one thing\n"


def test_a_terminal_gets_a_bar_and_a_table(make_run):
    """In a pseudo-terminal: rate, time left, checkpoint k of n; and the table is for people."""
    run = make_run()
    main, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "influence_cli", "score", str(run), "--queries", "0", "--top", "2"],
        stdout=child, stderr=child, env={**os.environ, "TERM": "xterm", "COLUMNS": "120"}, cwd=ROOT,
    )  # fmt: skip
    os.close(child)
    seen = b""
    while True:
        try:
            part = os.read(main, 65536)
        except OSError:
            break
        if not part:
            break
        seen += part
    assert process.wait() == 0
    text = seen.decode()
    assert "gradients of query examples" in text
    assert "scores" in text
    assert "checkpoint 2 of 2" in text
    assert "/s" in text
    assert "query,kind" not in text
    assert "proponent" in text
