"""The columns of every table, and the rows that fill them.

A column's name and its place are part of the command line's interface: scripts read them.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from influence_cli.output.ranking import Entry, RankedQueries

SCORE_COLUMNS = (
    "query", "kind", "rank", "train", "score",
    "query_label", "train_label", "query_text", "train_text",
)  # fmt: skip
ID_COLUMNS = ("query_id", "train_id")  # the user's own ids, last
TRACE_COLUMNS = ("query", "train", "step", "score", "running", "query_label", "train_label")
SELF_COLUMNS = ("rank", "train", "score", "loss", "train_label", "train_text")
CHECK_COLUMNS = ("check", "split", "subject", "result", "error", "allowed", "note")
METHOD_COLUMNS = ("method", "question", "needs", "cost", "source")
TEXT_PARTS = ("word", "token", "query-token")
PARTS = ("checkpoint", "layer", "step", *TEXT_PARTS)  # that --by can name
# Column types. A column of IDS holds integers, or names: a query `all`, a group of examples.
WHOLE_NUMBERS = frozenset({"rank", "n"})
FLOATS = frozenset({"score", "loss", "running", "error", "allowed", "value", "low", "high"})
SELF_KEYS = ("score", "loss")  # the columns that `self` can sort by
IDS = ("query", "train", "step")
SPLIT_ENTRIES = 256  # ranked pairs that SplitScores gets at once

Row = Sequence[Any]  # Any: a cell is an int, a float, a str or None
DescribeExample = Callable[[str, int], tuple[str, str, str]]  # (split, id) -> label, text, own id
# (query position, entries) -> for each entry its (part, score)
SplitScores = Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]]


def score_columns(by: str | None, has_ids: bool = False) -> tuple[str, ...]:
    """The columns of `score`. With `--by`, the column of that name follows `train`. `has_ids`: the
    definition has `id(example)`.
    """
    columns = (*SCORE_COLUMNS[:4], by, *SCORE_COLUMNS[4:]) if by else SCORE_COLUMNS
    return (*columns, *ID_COLUMNS) if has_ids else columns


def self_columns(has_ids: bool = False) -> tuple[str, ...]:
    """The columns of `self`. `has_ids`: the definition has `id(example)`."""
    return (*SELF_COLUMNS, ID_COLUMNS[1]) if has_ids else SELF_COLUMNS


def score_rows(
    ranking: RankedQueries,
    queries: list[int] | None,
    by: str | None,
    parts: Sequence[str],
    groups: Sequence[str] | None,
    describe: DescribeExample,
    split: SplitScores | None = None,
    has_ids: bool = False,
) -> Iterator[Row]:
    """One row per ranked pair, or per part of its score.

    `queries`: ids by position in the ranking; None: their sum, which the table calls `all`.
    `groups`: names that replace training ids. `split`: computes the parts of a score. `has_ids`:
    with the user's own ids, which a sum and a group do not have.
    """
    for position in range(ranking.queries):
        query: int | str = "all"
        query_label = query_text = query_id = ""
        if queries is not None:
            query = queries[position]
            query_label, query_text, query_id = describe("query", queries[position])
        entries = ranking.entries(position)
        while page := list(itertools.islice(entries, SPLIT_ENTRIES)):
            scores = split(position, page) if split is not None else None
            for number, (kind, rank, index, score, entry_parts) in enumerate(page):
                label, text, own_id = describe("train", index) if groups is None else ("", "", "")
                train = index if groups is None else groups[index]
                own_ids = (query_id, own_id) if has_ids else ()
                texts = (query_label, label, query_text, text, *own_ids)
                if not by:
                    yield (query, kind, rank, train, score, *texts)
                    continue
                named_parts = scores[number] if scores else zip(parts, entry_parts, strict=True)
                for part, part_score in named_parts:
                    yield (query, kind, rank, train, part, part_score, *texts)


def self_rows(
    entries: Iterable[Entry], sort: str, describe: DescribeExample, has_ids: bool = False
) -> Iterator[Row]:
    """The rows of `self`. The ranking is by `sort`, of SELF_KEYS; an entry's part is the other."""
    for entry in entries:
        (other,) = entry.parts
        score, loss = (entry.score, other) if sort == "score" else (other, entry.score)
        texts = describe("train", entry.train)[: 3 if has_ids else 2]
        yield (entry.rank, entry.train, score, loss, *texts)
