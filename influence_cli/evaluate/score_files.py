"""Reads a table that `score` or `self` wrote, in any of its formats, as scores by query."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from influence_cli.cache.id_blocks import Ids
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


def read_score_matrix(path: Path, queries: Ids, count: int) -> np.ndarray:
    """(Q, N) the scores of these queries and all training examples.

    Raises UsageProblem for a file without the score of one of these pairs.
    """
    scores_by_query = read_score_file(path)
    scores_QN = np.empty((len(queries), count))
    for row_N, query in zip(scores_QN, queries, strict=True):
        scores = scores_of_query(path, scores_by_query, int(query), count)
        missing = next((train for train in range(count) if train not in scores), None)
        if missing is not None:
            raise UsageProblem(
                f"{path} has no score of query {query} and training example {missing}",
                f"found: {len(scores):,} of {count:,} training examples of this query",
                "expected: all pairs, as `influence score --top all` writes them",
            )
        row_N[list(scores)] = list(scores.values())
    return scores_QN


def scores_of_query(
    path: Path, scores_by_query: Mapping[str, ScoresOfQuery], query: int, count: int
) -> dict[int, float]:
    """Training id -> score. Raises UsageProblem for an absent query, and for other ids than
    0 to `count` - 1.
    """
    scores = scores_by_query.get(str(query))
    if scores is None:
        raise UsageProblem(
            f"{path} has no scores of query {query}",
            f"found: {len(scores_by_query):,} queries, such as {next(iter(scores_by_query))}",
            "--queries selects the queries that the file has",
        )
    for train in scores:
        if not (train.isascii() and train.isdecimal() and int(train) < count):
            raise UsageProblem(
                f"{path}: query {query} has a score of {shown(train)}",
                f"expected: ids of training examples, 0 to {count - 1:,}",
            )
    return {int(train): score for train, score in scores.items()}


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
