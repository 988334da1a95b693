"""Writes notes and progress to stderr: a bar in a terminal, a line every 30 seconds in a log."""

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from influence_cli.output.visible import escape_controls, write_message
from influence_cli.progress import Advance, Reporter

LOG_SECONDS = 30.0  # between the lines of a log


class StderrReporter(Reporter):
    def __init__(self) -> None:
        self._notes: set[str] = set()

    def note(self, message: str) -> None:
        if message not in self._notes:
            self._notes.add(message)
            write_message(f"note: {message}")

    @contextmanager
    def progress(self, doing: str, total: int) -> Iterator[Advance]:
        if sys.stderr.isatty():
            with self._bar(doing, total) as advance:
                yield advance
        else:
            yield self._lines(doing, total)

    @contextmanager
    def _bar(self, doing: str, total: int) -> Iterator[Advance]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[where]}", markup=False),
        )
        with Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
        ) as bar:
            task = bar.add_task(escape_controls(doing), total=total, rate="", where="")
            started, done = time.monotonic(), 0

            def advance(examples: int, where: str = "") -> None:
                nonlocal done
                done += examples
                rate = done / max(1e-9, time.monotonic() - started)
                bar.update(
                    task,
                    advance=examples,
                    where=escape_controls(where),
                    rate=f"{rate:,.0f}/s",
                )

            yield advance

    def _lines(self, doing: str, total: int) -> Advance:
        started, last, done = time.monotonic(), time.monotonic(), 0

        def advance(examples: int, where: str = "") -> None:
            nonlocal last, done
            done += examples
            now = time.monotonic()
            if now - last >= LOG_SECONDS:
                last, rate = now, done / (now - started)
                parts = [f"{doing}: {done:,} of {total:,}", f"{rate:,.1f}/s"]
                if done:  # else nothing says how much time is left
                    left = datetime.timedelta(seconds=round((total - done) / rate))
                    parts.append(f"{left} left")
                write_message(", ".join([*parts, where] if where else parts))

        return advance
