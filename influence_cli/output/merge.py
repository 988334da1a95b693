"""Partial rankings into one: tables of `score` or `self` over different training examples, merged
as they are read.

Parts are in the order in which they were written, so that one pair of each is held at a time, and
two bytes per training example that tell whether a pair comes twice.
"""

import csv
import heapq
import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from influence_cli.errors import TableError, UsageProblem
from influence_cli.output.tables import SCORE_COLUMNS, SELF_COLUMNS, SUFFIXES, Row, score_columns

KINDS = ("proponent", "opponent")
PAGE = 1 << 16  # training ids whose parts are noted together
AGAIN = "write that part again"
Lines = Iterator[tuple[int, list[Any]]]  # line number, values


class Pair(NamedTuple):
    """One ranked pair of a part. `key`: its place in the merged order, (query, kind, falling or
    rising score, id); `rows`: one, or one per part of its score.
    """

    key: tuple[int, int, float, int]
    rows: list[list[Any]]


class Part:
    """A table, opened, and what was seen of it so far. `longest`: its largest rank; `ends`: the
    queries with a kind that ends exactly there; `whole`: it has scores of 0, which are ranked only
    where all are.
    """

    def __init__(self, name: str, stdin: IO[str]) -> None:
        """Raises UsageProblem (can't be opened), TableError (no table)."""
        self.name, self.line, self.longest, self.has_all_pairs = name, 0, 0, False
        self.ends: set[int] = set()
        self._lines = self._guarded(lines_of(name, stdin))
        _, self.columns = next(self._lines, (0, []))

    def _guarded(self, lines: Lines) -> Lines:
        """The same lines; what a reader says of a broken file becomes a TableError."""
        try:
            for line, values in lines:
                self.line = line
                yield line, values
        except (
            csv.Error,
            ValueError,
            AttributeError,
            OSError,
        ) as error:  # ValueError: also of json, of unicode and of pyarrow
            if isinstance(error, OSError) and not self.line:
                raise UsageProblem(
                    f"{self.name} can't be read: {error.strerror or error}",
                    "expected: a table of score or self",
                ) from error
            past = f" past line {self.line}" if self.line else ""
            raise TableError(f"{self.name} can't be read{past}: {error}", AGAIN) from error

    def broken(self, line: int, problem: str, remedy: str = AGAIN) -> TableError:
        return TableError(f"{self.name}, line {line}: {problem}", remedy)

    def pairs(self) -> Iterator[Pair]:
        """Its pairs. Raises TableError for a row that can't be one, and for one out of order."""
        columns, before = self.columns, (-2, 0, 0)
        score, divided = columns.index("score"), len(columns) > len(SCORE_COLUMNS)
        for identity, group in itertools.groupby(self._rows(), key=lambda row: row[1]):
            rows, (query, kind, _, train) = list(group), identity
            line = rows[0][0]
            if identity[:3] <= before or (len(rows) > 1 and not divided):
                raise self.broken(
                    line,
                    "out of order, or there twice",
                    "merge takes rows in the order in which score and self write them",
                )
            if identity[:2] != before[:2]:
                self._stretch(before)
            before = identity[:3]
            total = math.fsum(values[score] for _, _, values in rows)
            self.has_all_pairs |= total == 0
            yield Pair(
                (query, kind, total if kind else -total, train), [values for _, _, values in rows]
            )
        self._stretch(before)

    def _stretch(self, last: tuple[int, int, int]) -> None:
        """The rows of a query and kind end with this one."""
        query, _, rank = last
        if rank > self.longest:
            self.longest, self.ends = rank, set()
        if rank == self.longest:
            self.ends.add(query)

    def _rows(self) -> Iterator[tuple[int, tuple[int, int, int, int], list[Any]]]:
        """Line number, (query, kind, rank, train) as numbers, values; a query `all` is -1, `self`
        has one query and kind.
        """
        columns = self.columns
        at = {
            name: columns.index(name)
            for name in ("query", "kind", "rank", "train", "score")
            if name in columns
        }
        numbers = [name for name in ("query", "rank", "train") if name in at]
        for line, values in self._lines:
            if len(values) != len(columns):
                raise self.broken(line, f"{len(values)} columns, expected {len(columns)}")
            name = "score"
            try:
                values[at[name]] = float(values[at[name]])
                for name in numbers:
                    if name != "query" or values[at[name]] != "all":
                        values[at[name]] = int(values[at[name]])
            except (TypeError, ValueError):
                remedy = (
                    "sums per group can't be merged: torchrun shares the work of --group-by"
                    if name == "train"
                    else AGAIN
                )
                raise self.broken(
                    line, f"{name} is {values[at[name]]!r}, expected a number", remedy
                ) from None
            if (
                not math.isfinite(values[at["score"]])
                or values[at["rank"]] < 1
                or values[at["train"]] < 0
            ):
                raise self.broken(
                    line, "a score that is not finite, a rank below 1 or an id below 0"
                )
            query, kind = (values[at[name]] if name in at else "" for name in ("query", "kind"))
            if kind and kind not in KINDS:
                raise self.broken(line, f"kind is {kind!r}, expected {' or '.join(KINDS)}")
            place = query if isinstance(query, int) else -1, KINDS.index(kind) if kind else 0
            yield line, (*place, values[at["rank"]], values[at["train"]]), values


def open_parts(names: Sequence[str], stdin: IO[str]) -> tuple[list[Part], tuple[str, ...]]:
    """The tables and their columns. Raises UsageProblem, TableError: other columns than score's or
    self's, or than the first one's.
    """
    parts = [Part(name, stdin) for name in names]
    known = [part for part in parts if part.columns]
    for part in known:
        columns = tuple(part.columns)
        by = columns[4] if len(columns) == len(SCORE_COLUMNS) + 1 else None
        if columns not in (SELF_COLUMNS, score_columns(by)):
            raise TableError(
                f"{part.name} is no table of score or self",
                f"found: {', '.join(columns)}"[:300],
                "merge takes such tables",
            )
        if part.columns != known[0].columns:
            raise TableError(
                f"{part.name} has other columns than {known[0].name}",
                f"found:    {', '.join(part.columns)}",
                f"expected: {', '.join(known[0].columns)}",
                "all parts come from one command, with other shards",
            )
    return parts, tuple(known[0].columns) if known else SCORE_COLUMNS


def merged(parts: Sequence[Part], columns: Sequence[str], k: int | None) -> Iterator[Row]:
    """Rows in the order of `score`, ranked anew: k of each query and kind, or all. Raises
    TableError for a pair that comes twice.
    """
    rank_at, signed = columns.index("rank"), "kind" in columns

    def numbered(number: int, part: Part) -> Iterator[tuple[Pair, int]]:
        return ((pair, number) for pair in part.pairs())

    streams = [numbered(number, part) for number, part in enumerate(parts, start=1) if part.columns]
    everything = heapq.merge(*streams, key=lambda item: item[0].key)
    for _, of_query in itertools.groupby(everything, key=lambda item: item[0].key[0]):
        pages: dict[int, np.ndarray] = {}
        for _, of_kind in itertools.groupby(of_query, key=lambda item: item[0].key[1]):
            rank = 0
            for (key, rows), number in of_kind:
                page, at = divmod(key[3], PAGE)
                if page not in pages:
                    pages[page] = np.zeros(PAGE, np.uint16)
                if pages[page][at]:
                    of = f" of query {rows[0][0]}" if signed else ""
                    raise TableError(
                        f"training example {key[3]}{of} stands in both "
                        f"{parts[pages[page][at] - 1].name} and {parts[number - 1].name}",
                        "expected: parts of different training examples, each shard once and all "
                        "of the same count",
                    )
                pages[page][at] = number
                if k is None or (
                    rank < k and not (signed and key[2] == 0)
                ):  # a score of 0 is ranked where all are
                    rank += 1
                    for row in rows:
                        row[rank_at] = rank
                        yield row


def shortened(parts: Sequence[Part], k: int | None) -> int | None:
    """Once all is read: how many rows of each query and kind the parts seem to have been cut to,
    where that is less than `k`; else None.
    """
    longest = max((part.longest for part in parts), default=0)
    cut = any(
        part.longest == longest and len(part.ends) > 1 and not part.has_all_pairs for part in parts
    )
    return longest if cut and longest and (k is None or k > longest) else None


# ---------------------------------------------------------------- reading
def lines_of(name: str, stdin: IO[str]) -> Lines:
    """Header and rows of a table in the format of its name's ending; `-` is csv from stdin."""
    format = "csv" if name == "-" else SUFFIXES.get(Path(name).suffix.lower(), "csv")
    if format == "parquet":
        yield from _parquet(Path(name))
        return
    with (
        nullcontext(stdin) if name == "-" else Path(name).open(encoding="utf-8", newline="") as file
    ):
        yield from (
            _json(file) if format == "jsonl" else _separated(file, "\t" if format == "tsv" else ",")
        )


def _separated(file: IO[str], delimiter: str) -> Lines:
    csv.field_size_limit(1 << 30)  # texts may be long
    reader = csv.reader(file, delimiter=delimiter)
    for values in reader:
        yield reader.line_num, values
    if not reader.line_num:
        raise ValueError("an empty file, without the line of columns")


def _json(file: IO[str]) -> Lines:
    columns: list[str] = []
    for line, text in enumerate(file, start=1):
        row = json.loads(text)
        if not columns:
            columns = list(row)
            yield 0, columns
        if list(row) != columns:
            raise ValueError(f"found {', '.join(row)}, expected {', '.join(columns)}")
        yield line, list(row.values())


def _parquet(path: Path) -> Lines:
    if importlib.util.find_spec("pyarrow") is None:
        raise UsageProblem(
            f"{path}: parquet needs pyarrow", "install it: pip install 'influence-cli[parquet]'"
        )
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield 0, list(file.schema_arrow.names)
        rows = (
            zip(*(column.to_pylist() for column in batch.columns), strict=True)
            for batch in file.iter_batches(batch_size=1024)
        )
        for line, values in enumerate(itertools.chain.from_iterable(rows), start=1):
            yield line, list(values)
