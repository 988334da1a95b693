"""Tables for people and pipes: csv, tsv, jsonl, parquet, and a terminal table. Rows are written as
they come.
"""

import csv
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from influence_cli.errors import OutputError, UsageProblem
from influence_cli.output.ranking import Entry, Ranking
from influence_cli.storage.atomic import describe_disk_error, replace_text_file

FORMATS = ("table", "csv", "tsv", "jsonl", "parquet")
SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
SCORE_COLUMNS = (
    "query",
    "kind",
    "rank",
    "train",
    "score",
    "query_label",
    "train_label",
    "query_text",
    "train_text",
)
TRACE_COLUMNS = ("query", "train", "step", "score", "running", "query_label", "train_label")
SELF_COLUMNS = ("rank", "train", "score", "train_label", "train_text")
CHECK_COLUMNS = ("check", "split", "subject", "result", "error", "allowed", "note")
METHOD_COLUMNS = ("method", "question", "needs", "cost", "source")
WHOLE_NUMBERS, FLOATS = {"rank"}, {"score", "running", "error", "allowed"}
SPLIT = 256  # ranked pairs divided at once
CHUNK = 1000  # rows of a terminal table, or of a parquet row group, held at once

Row = Sequence[Any]
Describe = Callable[[str, int], tuple[str, str]]  # (split, id) -> label, text
Split = Callable[
    [int, Sequence[Entry]], list[list[tuple[str, float]]]
]  # (query position, entries) -> per entry its (part, score)


# ---------------------------------------------------------------- rows
def score_columns(by: str | None) -> tuple[str, ...]:
    """With `--by`, the column of that name follows `train`."""
    return (*SCORE_COLUMNS[:4], by, *SCORE_COLUMNS[4:]) if by else SCORE_COLUMNS


def score_rows(
    ranking: Ranking,
    queries: list[int] | None,
    by: str | None,
    parts: Sequence[str],
    groups: Sequence[str] | None,
    describe: Describe,
    split: Split | None = None,
) -> Iterator[Row]:
    """One row per ranked pair, or per part of it. `queries` None: all as one, named `all`;
    `groups`: names in place of training ids.
    """
    for position in range(ranking.queries):
        query = queries[position] if queries is not None else None
        query_label, query_text = describe("query", query) if query is not None else ("", "")
        entries = ranking.entries(position)
        while some := list(itertools.islice(entries, SPLIT)):
            if split is not None:
                divided = split(position, some)
            else:
                divided = [
                    list(zip(parts, entry.parts, strict=True)) if by else [("", entry.score)]
                    for entry in some
                ]
            for entry, pieces in zip(some, divided, strict=True):
                train_label, train_text = (
                    describe("train", entry.train) if groups is None else ("", "")
                )
                for part, score in pieces:
                    yield (
                        "all" if query is None else query,
                        entry.kind,
                        entry.rank,
                        entry.train if groups is None else groups[entry.train],
                        *([part] if by else []),
                        score,
                        query_label,
                        train_label,
                        query_text,
                        train_text,
                    )


def self_rows(entries: Iterable[Entry], describe: Describe) -> Iterator[Row]:
    for entry in entries:
        yield (entry.rank, entry.train, entry.score, *describe("train", entry.train))


# ---------------------------------------------------------------- writing
@dataclass(frozen=True)
class TableWriter:
    """Where a table goes, and how: stdout, or a file that is written whole or not at all."""

    format: str
    output: Path | None
    stdout: IO[str]

    @classmethod
    def open(
        cls, requested: str | None, output: Path | None, stdout: IO[str] | None = None
    ) -> "TableWriter":
        """From `--format` and `-o`: what is asked, else the ending of the file, else a table for a
        terminal and csv for a pipe.

        Raises UsageProblem for what can be known before the work: an unknown format, a missing
        folder or library.
        """
        stdout = stdout or sys.__stdout__ or sys.stdout
        format = requested or (
            SUFFIXES.get(output.suffix.lower(), "csv")
            if output
            else "table"
            if stdout.isatty()
            else "csv"
        )
        if format not in FORMATS:
            raise UsageProblem(f"--format {format}: unknown", f"expected: {', '.join(FORMATS)}")
        if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
            raise UsageProblem(
                f"-o {output}: {'a folder is there' if output.is_dir() else 'no such folder'}",
                "expected: a file's name",
            )
        if format == "parquet":
            if importlib.util.find_spec("pyarrow") is None:
                raise UsageProblem(
                    "--format parquet needs pyarrow",
                    "install it: pip install 'influence-cli[parquet]'",
                )
            if output is None and stdout.isatty():
                raise UsageProblem(
                    "--format parquet is binary and stdout is a terminal",
                    "-o FILE writes it to a file",
                )
        return cls(format, output, stdout)

    def write(self, rows: Iterable[Row], columns: Sequence[str]) -> None:
        """Write a table. Nothing is written before the first row is there."""
        rows = iter(rows)
        rows = itertools.chain(list(itertools.islice(rows, 1)), rows)
        with to_stdout(self.stdout) if self.output is None else to_file(self.output) as file:
            _write(rows, columns, self.format, file)


def _write(rows: Iterable[Row], columns: Sequence[str], format: str, file: IO[str]) -> None:
    if format in ("csv", "tsv"):
        writer = csv.writer(file, delimiter="\t" if format == "tsv" else ",", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)  # floats come out as repr: every digit
    elif format == "jsonl":
        for row in rows:
            file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")
    elif format == "parquet":
        _parquet(rows, columns, file)
    else:
        _terminal(rows, columns, file)


def _parquet(rows: Iterable[Row], columns: Sequence[str], file: IO[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    first = list(itertools.islice(rows, CHUNK))
    place = {name: columns.index(name) for name in ("query", "train", "step") if name in columns}
    ids = {name for name, at in place.items() if all(isinstance(row[at], int) for row in first)}
    kinds = {
        name: pa.int64()
        if name in WHOLE_NUMBERS | ids
        else pa.float64()
        if name in FLOATS
        else pa.string()
        for name in columns
    }
    schema = pa.schema(list(kinds.items()))
    file.flush()
    with pq.ParquetWriter(file.buffer, schema) as writer:  # type: ignore[attr-defined]
        chunks = itertools.chain(
            [first], iter(lambda: list(itertools.islice(rows, CHUNK * 64)), [])
        )
        for chunk in chunks:
            writer.write_table(
                pa.table(
                    [list(part) for part in zip(*chunk, strict=True)] or [[] for _ in columns],
                    schema=schema,
                )
            )


def _terminal(rows: Iterable[Row], columns: Sequence[str], file: IO[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False)
    rows = iter(rows)
    chunk = list(itertools.islice(rows, CHUNK))
    shown = [
        name
        for name in columns
        if not name.endswith(("_label", "_text")) or any(row[columns.index(name)] for row in chunk)
    ]
    at = [columns.index(name) for name in shown]
    while True:
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        widths = {
            name: max(len(name), *(len(_cell(row[columns.index(name)])) for row in chunk), 0)
            for name in shown
        }
        texts = [name for name in shown if name.endswith("_text")]
        room = console.width - sum(width + 2 for name, width in widths.items() if name not in texts)
        widths |= {
            name: min(widths[name], max(len(name), room // len(texts) - 2)) for name in texts
        }  # texts give way, numbers never
        console.width = max(console.width, sum(widths.values()) + 2 * len(widths))
        for name in shown:
            number = name in ("rank", "score", "query", "train", "step", "running")
            table.add_column(
                name,
                justify="right" if number else "left",
                no_wrap=True,
                min_width=widths[name],
                max_width=widths[name],
            )
        styles = {"kind": _COLOURS, "result": _COLOURS}
        shares = word_shares(chunk, columns)
        before: Any = None
        for place, row in enumerate(chunk):
            if before is not None and "query" in columns and row[0] != before:
                table.add_row()
            before = row[0]
            cells = [
                Text(
                    _short(_cell(row[i]), widths[columns[i]]),
                    style=styles.get(columns[i], {}).get(row[i], ""),
                )
                for i in at
            ]
            if shares:
                cells[shown.index("word")].style = _shade(shares[place])
            table.add_row(*cells)
        console.print(table)
        chunk = list(itertools.islice(rows, CHUNK))
        if not chunk:
            return


def word_shares(rows: Sequence[Row], columns: Sequence[str]) -> list[float]:
    """Of each word row its signed share of all that the words of its pair add and take away; empty
    where rows are no words.
    """
    if "word" not in columns:
        return []
    score = columns.index("score")
    sums: dict[Row, float] = {}
    for row in rows:
        sums[row[:4]] = sums.get(row[:4], 0.0) + abs(row[score])
    return [row[score] / sums[row[:4]] if sums[row[:4]] else 0.0 for row in rows]


def _shade(share: float) -> str:
    """Helping words green, hurting ones red (the sign of their score says it without colour), the
    stronger the brighter.
    """
    strength = "bold " if abs(share) >= 0.25 else "dim " if abs(share) < 0.05 else ""
    return f"{strength}{'green' if share > 0 else 'red'}" if share else "dim"


_COLOURS = {"proponent": "green", "opponent": "red", "ok": "green", "FAILED": "red"}


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else " ".join(str(value).split())


@contextmanager
def to_stdout(stdout: IO[str]) -> Iterator[IO[str]]:
    """Flushes at the end. Raises OutputError where stdout can't be written; a closed pipe stays a
    BrokenPipeError.
    """
    try:
        yield stdout
        stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(
            describe_disk_error("stdout", error),
            "free some space, or write elsewhere",
        ) from error


@contextmanager
def to_file(path: Path) -> Iterator[IO[str]]:
    """A text file that replaces `path` when it is complete. Raises OutputError on a disk error."""
    try:
        with replace_text_file(path) as file:
            yield file
    except OSError as error:
        raise OutputError(
            describe_disk_error(path, error),
            "nothing was written; -o FILE names another place",
        ) from error
