"""Reads a table that `score` or `self` wrote, in any of its formats, as scores by query."""

import csv
import io
import math
from pathlib import Path

from influence_cli.errors import TableError, UsageProblem, shown
from influence_cli.output.formats import read_rows

ALL_QUERIES = "all"  # the query of a table of `self`, which has no queries

ScoresOfQuery = dict[str, float]  # training id, or name of a group -> score


def read_score_file(path: Path) -> dict[str, ScoresOfQuery]:
    """Query -> its scores. The parts of a pair (--by) are added.

    Raises UsageProblem for a file that can't be opened, TableError for one that is no table of
    `score` or `self`.
    """
    if not path.is_file():
        raise UsageProblem(f"{path}: no such file", "expected: a table that score wrote")
    try:
        return sum_parts(path)
    except (csv.Error, ValueError, OSError) as error:  # pyarrow raises OSError for a damaged file
        raise TableError(f"{path} can't be read: {error}", "write this table again") from error


def sum_parts(path: Path) -> dict[str, ScoresOfQuery]:
    """Raises TableError for a row without a number as its score, or another number of cells."""
    rows = read_rows(str(path), io.StringIO())
    _, columns = next(rows, (0, []))
    if not {"train", "score"} <= set(columns):
        raise TableError(
            f"{path} is not a table of score or self",
            f"found: {', '.join(map(str, columns[:12])) or 'no columns'}",
            "expected: columns query, train and score",
        )
    train_at, score_at = columns.index("train"), columns.index("score")
    query_at = columns.index("query") if "query" in columns else None
    scores: dict[str, ScoresOfQuery] = {}
    for line, cells in rows:
        if len(cells) != len(columns):
            raise TableError(
                f"{path}, line {line}: {len(cells)} columns, expected {len(columns)}",
                "write this table again",
            )
        score = parse_finite(cells[score_at])
        if score is None:
            raise TableError(
                f"{path}, line {line}: score is {shown(cells[score_at])}, expected a number",
                "write this table again",
            )
        query = ALL_QUERIES if query_at is None else str(cells[query_at])
        of_query, train = scores.setdefault(query, {}), str(cells[train_at])
        of_query[train] = of_query.get(train, 0.0) + score
    if not scores:
        raise TableError(f"{path} has no rows", "expected: a table that score wrote")
    return scores


def parse_finite(cell: object) -> float | None:
    """The number of a cell; None if it is none, or not finite."""
    try:
        value = float(cell) if isinstance(cell, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None
