"""Reads the scores of a table that `score` or `self` wrote, in any of its formats."""

import csv
import io
import math
from collections.abc import Iterator, Sequence
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
    """The rows of a file; `-` is csv from stdin. See open_table and parse_rows for errors."""
    columns, rows = open_table(name, stdin)
    yield from parse_rows(name, columns, rows)


def open_table(
    name: str, stdin: IO[str], expected: str = "expected: a table that score wrote"
) -> tuple[list[str], Iterator[NumberedRow]]:
    """The columns of a file, and its rows; `-` is csv from stdin. `expected`: for error messages.

    Raises UsageProblem for a file that can't be opened; TableError, from the iterator, too, for one
    that is broken or has no rows.
    """
    if name == "-" and stdin.isatty():
        raise UsageProblem("-: stdin is a terminal", "pipe a table in, or name its file")
    if name != "-" and not Path(name).is_file():
        raise UsageProblem(f"{name}: no such file", expected)
    rows = check_rows(name, read_rows(name, stdin), expected)
    _, columns = next(rows, (0, []))
    return columns, rows


def check_rows(name: str, rows: Iterator[NumberedRow], expected: str) -> Iterator[NumberedRow]:
    """The header and the rows. Raises TableError if the file is broken or has no rows."""
    count = 0
    try:
        for row in rows:
            count += 1
            yield row
    except (csv.Error, ValueError, OSError) as error:  # pyarrow raises OSError for a damaged file
        raise TableError(f"{name} can't be read: {error}", WRITE_AGAIN) from error
    if count == 1:
        raise TableError(f"{name} has no rows", expected)


class ScorePlaces(NamedTuple):
    """Where the columns of a table are; None: it has no such column. `width`: their number."""

    width: int
    train: int
    score: int
    query: int | None
    label: int | None


def find_places(name: str, columns: list[str]) -> ScorePlaces:
    """Raises TableError for a table without training ids or scores."""
    if not {"train", "score"} <= set(columns):
        raise TableError(
            f"{name} is not a table of score or self",
            f"found: {', '.join(map(str, columns[:12])) or 'no columns'}",
            "expected: columns query, train and score",
        )
    place = {column: at for at, column in reversed(list(enumerate(columns)))}
    return ScorePlaces(
        len(columns), place["train"], place["score"], place.get("query"), place.get("train_label")
    )


def parse_rows(name: str, columns: list[str], rows: Iterator[NumberedRow]) -> Iterator[ScoreRow]:
    """The rows of a table. Raises TableError as find_places and parse_row do."""
    places = find_places(name, columns)
    for line, cells in rows:
        yield parse_row(name, places, line, cells)


def parse_row(name: str, places: ScorePlaces, line: int, cells: Sequence[object]) -> ScoreRow:
    """Raises TableError for a row without an id or a finite score, or with another number of
    cells.
    """
    if len(cells) != places.width:
        problem = f"{len(cells)} columns, expected {places.width}"
        raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
    score, train = parse_finite(cells[places.score]), cells[places.train]
    if score is None:
        problem = f"score is {shown(cells[places.score])}, expected a number"
        raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
    if train is None or train == "":
        problem = f"train is {shown(train)}, expected an id"
        raise TableError(f"{name}, line {line}: {problem}", WRITE_AGAIN)
    query = ALL_QUERIES if places.query is None else str(cells[places.query])
    label = None if places.label is None else cells[places.label]
    return ScoreRow(query, str(train), score, label if label is None else str(label))


def parse_finite(cell: object) -> float | None:
    """The number of a cell; None if it is none, or not finite."""
    try:
        value = float(cell) if isinstance(cell, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
