"""Reads tables of score, trace, self and evaluate, with the record of how each was made."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from influence_cli.errors import TableError, UsageProblem
from influence_cli.output.columns import Row
from influence_cli.output.score_tables import open_table
from influence_cli.output.table_record import Record, read_record
from influence_cli.progress import Reporter
from influence_cli.report.collected_tables import PairTable, SelfTable
from influence_cli.report.example_list import ExampleList
from influence_cli.report.quality import QUALITY_COLUMNS, QualityTable

EXPECTED = "expected: a table that score, self, trace or evaluate wrote"
Table = PairTable | SelfTable | QualityTable


def read_table(name: str, stdin: IO[str], examples: ExampleList, top: int | None) -> Table:
    """The table of a file; `-` is csv from stdin. `top`: pairs of each kind and query to keep.

    Adds its examples to `examples`. Raises UsageProblem for a file that can't be opened, TableError
    for one that is no table, is broken, or is one part of several.
    """
    record = read_record(name)
    columns, rows = open_table(name, stdin, EXPECTED)
    table = new_table(name, columns, record, examples, top)
    for line, cells in rows:
        table.add(line, cells)
    table.written = describe_time(name)
    return table


def new_table(
    name: str, columns: list[str], record: Record | None, examples: ExampleList, top: int | None
) -> Table:
    """An empty table for rows with these columns."""
    check_complete(name, record or {})
    if set(columns) >= set(QUALITY_COLUMNS):
        return QualityTable(name, columns, record)
    if not {"train", "score"} <= set(columns):
        raise TableError(
            f"{name} is no table of score, self, trace or evaluate",
            f"found: {', '.join(map(str, columns[:12])) or 'no columns'}",
            "expected: columns query, train and score; or rank, train and score",
        )
    if "query" in columns:
        return PairTable(name, columns, record, examples, top)
    return SelfTable(name, columns, record, examples)


def check_complete(name: str, record: Record) -> None:
    """Raises UsageProblem for one part of a table."""
    if (shard := record.get("shard")) is not None:
        raise UsageProblem(
            f"{name} is part {shard[0]} of {shard[1]}: ranks of its examples are not those of all",
            "merge the parts first: influence merge PART... -o scores.csv",
        )


def note_other_runs(tables: Sequence[Table], reporter: Reporter) -> None:
    """Say where two tables name no common checkpoint: they may be of different data."""
    checkpoints = [
        (
            table.name,
            set(map(str, (table.record or {}).get("request", {}).get("checkpoints") or [])),
        )
        for table in tables
    ]
    for (first, steps), (second, other_steps) in itertools.combinations(checkpoints, 2):
        if steps and other_steps and not steps & other_steps:
            reporter.note(
                f"{first} and {second} have no checkpoint in common: make sure that they are of "
                "the same data"
            )
            return


def collect_rows(rows: Iterable[Row], table: Table) -> Iterator[Row]:
    """The same rows. Adds each to the table on its way."""
    for line, row in enumerate(rows, start=1):
        table.add(line, row)
        yield row


def describe_time(name: str) -> str:
    """When a file was written, in UTC; empty for stdin."""
    if name == "-":
        return ""
    return f"{datetime.fromtimestamp(Path(name).stat().st_mtime, UTC):%Y-%m-%d %H:%M} UTC"


def describe_now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
