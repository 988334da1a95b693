"""Reads the scores of a table that `score` or `self` wrote, in any of its formats."""

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from influence_cli.errors import TableError, UsageProblem, shown
from influence_cli.output.formats import NumberedRow, read_rows

ALL_QUERIES = "all"  # the query of a table of `self`, which has no queries
WRITE_AGAIN = "write this table again"

ScoresOfQuery = dict[str, float]  # training id, or name of a group -> score


class ScoreRow(NamedTuple):
    """One row. `train`: a training id, or the name of a group. `label`: None without a column."""

    query: str
    train: str
    score: float
    label: str | None


def read_score_file(path: Path) -> dict[str, ScoresOfQuery]:
    """Query -> its scores. The parts of a pair (--by) are added. See read_score_rows."""
    scores: dict[str, ScoresOfQuery] = {}
    for row in read_score_rows(str(path), io.StringIO()):
        of_query = scores.setdefault(row.query, {})
        of_query[row.train] = of_query.get(row.train, 0.0) + row.score
    return scores


def read_score_rows(name: str, stdin: IO[str]) -> Iterator[ScoreRow]:
    """The rows of a file; `-` is csv from stdin.

    Raises UsageProblem for a file that can't be opened, TableError for one that is no table of
    `score` or `self`, or has no rows.
    """
    if name == "-" and stdin.isatty():
        raise UsageProblem("-: stdin is a terminal", "pipe a table in, or name its file")
    if name != "-" and not Path(name).is_file():
        raise UsageProblem(f"{name}: no such file", "expected: a table that score wrote")
    try:
        rows = read_rows(name, stdin)
        _, columns = next(rows, (0, []))
        empty = True
        for row in parse_rows(name, columns, rows):
            empty = False
            yield row
    except (csv.Error, ValueError, OSError) as error:  # pyarrow raises OSError for a damaged file
        raise TableError(f"{name} can't be read: {error}", WRITE_AGAIN) from error
    if empty:
        raise TableError(f"{name} has no rows", "expected: a table that score wrote")


def parse_rows(name: str, columns: list[str], rows: Iterator[NumberedRow]) -> Iterator[ScoreRow]:
    """Raises TableError for a row without an id or a finite score, or with another number of
    cells.
    """
    if not {"train", "score"} <= set(columns):
        raise TableError(
            f"{name} is not a table of score or self",
            f"found: {', '.join(map(str, columns[:12])) or 'no columns'}",
            "expected: columns query, train and score",
        )
    train_at, score_at = columns.index("train"), columns.index("score")
    query_at = columns.index("query") if "query" in columns else None
    label_at = columns.index("train_label") if "train_label" in columns else None
    for line, cells in rows:
        if len(cells) != len(columns):
            problem = f"{len(cells)} columns, expected {len(columns)}"
            raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
        score, train = parse_finite(cells[score_at]), cells[train_at]
        if score is None:
            problem = f"score is {shown(cells[score_at])}, expected a number"
            raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
        if train is None or train == "":
            problem = f"train is {shown(train)}, expected an id"
            raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
        query = ALL_QUERIES if query_at is None else str(cells[query_at])
        label = None if label_at is None else cells[label_at]
        yield ScoreRow(query, str(train), score, label if label is None else str(label))


def parse_finite(cell: object) -> float | None:
    """The number of a cell; None if it is none, or not finite."""
    try:
        value = float(cell) if isinstance(cell, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
