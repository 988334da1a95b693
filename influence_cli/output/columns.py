"""The columns of every table, and the rows that fill them.

A column's name and its place are part of the command line's interface: scripts read them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from influence_cli.output.ranking import Entry, Ranking

SCORE_COLUMNS = (
    "query", "kind", "rank", "train", "score",
    "query_label", "train_label", "query_text", "train_text",
)  # fmt: skip
TRACE_COLUMNS = ("query", "train", "step", "score", "running", "query_label", "train_label")
SELF_COLUMNS = ("rank", "train", "score", "train_label", "train_text")
CHECK_COLUMNS = ("check", "split", "subject", "result", "error", "allowed", "note")
METHOD_COLUMNS = ("method", "question", "needs", "cost", "source")
# Column types. A column of IDS holds integers, or names: a query `all`, a group of examples.
WHOLE_NUMBERS = frozenset({"rank"})
FLOATS = frozenset({"score", "running", "error", "allowed"})
IDS = ("query", "train", "step")
SPLIT_ENTRIES = 256  # ranked pairs that SplitScores gets at once

Row = Sequence[Any]  # Any: a cell is an int, a float, a str or None
DescribeExample = Callable[[str, int], tuple[str, str]]  # (split, id) -> label, text
# (query position, entries) -> for each entry its (part, score)
SplitScores = Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]]


def score_columns(by: str | None) -> tuple[str, ...]:
    """The columns of `score`. With `--by`, the column of that name follows `train`."""
    return (*SCORE_COLUMNS[:4], by, *SCORE_COLUMNS[4:]) if by else SCORE_COLUMNS


def score_rows(
    ranking: Ranking,
    queries: list[int] | None,
    by: str | None,
    parts: Sequence[str],
    groups: Sequence[str] | None,
    describe: DescribeExample,
    split: SplitScores | None = None,
) -> Iterator[Row]:
    """One row per ranked pair, or per part of its score.

    `queries`: ids by position in the ranking; None: their sum, which the table calls `all`.
    `groups`: names that replace training ids. `split`: computes the parts of a score.
    """
    for position in range(ranking.queries):
        query = queries[position] if queries is not None else "all"
        query_label, query_text = describe("query", query) if isinstance(query, int) else ("", "")
        entries = ranking.entries(position)
        while page := list(itertools.islice(entries, SPLIT_ENTRIES)):
            if split is not None:
                scores = split(position, page)
            elif by:
                scores = [list(zip(parts, entry.parts, strict=True)) for entry in page]
            else:
                scores = [[("", entry.score)] for entry in page]
            for entry, parts_of_entry in zip(page, scores, strict=True):
                label, text = describe("train", entry.train) if groups is None else ("", "")
                train = entry.train if groups is None else groups[entry.train]
                for part, score in parts_of_entry:
                    first_cells = query, entry.kind, entry.rank, train, *([part] if by else [])
                    yield (*first_cells, score, query_label, label, query_text, text)


def self_rows(entries: Iterable[Entry], describe: DescribeExample) -> Iterator[Row]:
    """The rows of `self`."""
    for entry in entries:
        yield (entry.rank, entry.train, entry.score, *describe("train", entry.train))
