"""What goes to stderr: notes, and progress as a bar in a terminal or a plain line now and then in a
log.
"""

import datetime
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from influence_cli.progress import Advance, Reporter

EVERY = 30.0  # seconds between the lines of a log


class StderrReporter(Reporter):
    def __init__(self) -> None:
        self._said: set[str] = set()

    def note(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            print(f"note: {message}", file=sys.stderr, flush=True)

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
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[where]}"),
        )
        with Progress(
            *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
        ) as bar:
            task, started, done = (
                bar.add_task(doing, total=total, rate="", where=""),
                time.monotonic(),
                0,
            )

            def advance(examples: int, where: str = "") -> None:
                nonlocal done
                done += examples
                bar.update(
                    task,
                    advance=examples,
                    where=where,
                    rate=f"{done / max(1e-9, time.monotonic() - started):,.0f}/s",
                )

            yield advance

    def _lines(self, doing: str, total: int) -> Advance:
        started, last, done = time.monotonic(), time.monotonic(), 0

        def advance(examples: int, where: str = "") -> None:
            nonlocal last, done
            done += examples
            now = time.monotonic()
            if now - last >= EVERY:
                last, rate = now, done / (now - started)
                left = datetime.timedelta(seconds=round((total - done) / rate))
                print(
                    f"{doing}: {done:,} of {total:,}, {rate:,.1f}/s, {left} left, {where}".rstrip(
                        ", "
                    ),
                    file=sys.stderr,
                    flush=True,
                )

        return advance
