"""Merges tables of `score` or `self` over different training examples into one.

A shard of a job array writes a partial ranking as a table. The tables are read row by row and
merged by the function that also merges the rankings of ranks. Memory: one pair of each table, and
two bytes per training example to find pairs that come twice.
"""

import csv
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from influence_cli.errors import TableError, UsageProblem, shown
from influence_cli.output.columns import (
    PARTS,
    SCORE_COLUMNS,
    SELF_KEYS,
    Row,
    score_columns,
    self_columns,
)
from influence_cli.output.formats import NumberedRow, read_rows, shown_names
from influence_cli.output.ranking import KINDS, SortablePair, merge_partial_rankings

PAGE = 1 << 16  # consecutive training ids whose tables are noted in one array
WRITE_AGAIN = "write this table again"
IN_ORDER = "merge expects the rows in the order in which score and self write them"
ALL_QUERIES = -1  # the query `all` as a number
NUMBERS = frozenset({"query", "rank", "train", "score", "loss"})  # columns; the others hold texts
WHOLE_NUMBER = re.compile("0|-?[1-9][0-9]{0,18}")  # as `score` writes it
LARGEST_WHOLE = 1 << 63

Place = tuple[int, int, int, int]  # (query, kind, rank, training id); `self` has query and kind 0


class PartialTable:
    """An open table, and what it has shown so far.

    `longest`: its largest rank. `ends`: the queries with a kind whose largest rank is `longest`.
    `has_all_pairs`: it has a score of 0, which only --top all ranks.
    """

    def __init__(self, name: str, stdin: IO[str]) -> None:
        """Raises UsageProblem if the file can't be opened, TableError if it is no table."""
        self.name, self.line, self.longest, self.has_all_pairs = name, 0, 0, False
        self.ends: set[int] = set()
        self._rows = self._report_broken_file(read_rows(name, stdin))
        _, self.columns = next(self._rows, (0, []))

    def _report_broken_file(self, rows: Iterator[NumberedRow]) -> Iterator[NumberedRow]:
        """The same rows. Turns a reader's exception into a TableError."""
        try:
            for line, cells in rows:
                self.line = line
                yield line, cells
        except (csv.Error, ValueError, OSError) as error:
            # pyarrow raises OSError without errno for a damaged file
            if isinstance(error, OSError) and error.errno is not None and not self.line:
                raise UsageProblem(
                    f"{self.name} can't be read: {error.strerror or error}",
                    "expected: a table of score or self",
                ) from error
            after = f" after line {self.line}" if self.line else ""
            raise TableError(f"{self.name} can't be read{after}: {error}", WRITE_AGAIN) from error

    def _broken(self, line: int, problem: str, *remedies: str) -> TableError:
        return TableError(f"{self.name}, line {line}: {problem}", *(remedies or (WRITE_AGAIN,)))

    def pairs(self, number: int, key_column: str) -> Iterator[SortablePair]:
        """Its pairs. Section: (query, kind); content: `number` and the rows of the pair.

        Raises TableError for a row that can't be a pair, or that is out of order.
        """
        key_at = self.columns.index(key_column)
        has_parts = part_of(self.columns) is not None
        before, last_key, columns = (-2, 0, 0), 0.0, self.columns
        for place, group in itertools.groupby(self._placed_rows(), key=lambda item: item[0]):
            lines, rows = zip(*((line, cells) for _, line, cells in group), strict=True)
            query, kind, rank, train = place
            if (query, kind, rank) <= before or (len(rows) > 1 and not has_parts):
                raise self._broken(lines[0], "this row is out of order, or comes twice", IN_ORDER)
            try:
                total = math.fsum(cells[key_at] for cells in rows)
            except OverflowError:
                raise self._broken(lines[0], "the sum of its parts is not finite") from None
            key = total if kind else -total
            if (query, kind) != before[:2]:
                self._end_section(before)
            elif key < last_key and not has_parts:  # parts add up to rounded scores
                problem = f"its {key_column} belongs before the row above"
                raise self._broken(lines[0], problem, IN_ORDER, *other_orders(columns, key_column))
            before, last_key = (query, kind, rank), key
            self.has_all_pairs |= total == 0
            yield (query, kind), key, train, (number, rows)
        self._end_section(before)

    def _end_section(self, last: tuple[int, int, int]) -> None:
        """Note the last rank of a query and kind."""
        query, _, rank = last
        if rank > self.longest:
            self.longest, self.ends = rank, set()
        if rank == self.longest:
            self.ends.add(query)

    def _placed_rows(self) -> Iterator[tuple[Place, int, list[Any]]]:
        """Place, line number and cells of each row. Turns the cells of numbers into numbers."""
        columns = self.columns
        position = {name: at for at, name in enumerate(columns)}
        for line, cells in self._rows:
            if len(cells) != len(columns):
                raise self._broken(line, f"{len(cells)} columns, expected {len(columns)}")
            self._parse_numbers(line, cells, position)
            rank, train = cells[position["rank"]], cells[position["train"]]
            query = cells[position["query"]] if "query" in position else 0
            lowest_id = train if query == "all" else min(query, train)
            scores = [cells[position[name]] for name in SELF_KEYS if name in position]
            if not all(map(math.isfinite, scores)) or rank < 1 or lowest_id < 0:
                raise self._broken(
                    line, "the score is not finite, the rank is below 1, or an id is below 0"
                )
            if "kind" not in position:
                yield (0, 0, rank, train), line, cells
                continue
            kind = cells[position["kind"]]
            if kind not in KINDS:
                raise self._broken(line, f"kind is {shown(kind)}, expected {' or '.join(KINDS)}")
            number = ALL_QUERIES if query == "all" else query
            yield (number, KINDS.index(kind), rank, train), line, cells

    def _parse_numbers(self, line: int, cells: list[Any], position: dict[str, int]) -> None:
        """Parse score, query (a number or `all`), rank and train in place. The others are texts."""
        for name, at in position.items():
            cell = cells[at]
            if name not in NUMBERS:
                if not (cell is None or isinstance(cell, str)):
                    raise self._broken(line, f"{name[:30]} is {shown(cell)}, expected a text")
                continue
            if name == "query" and cell == "all":
                continue
            number = parse_score(cell) if name in SELF_KEYS else parse_whole_number(cell)
            if number is None:
                remedy = WRITE_AGAIN
                if name == "train":
                    remedy = "merge can't add sums per group; to share --group-by use torchrun"
                raise self._broken(line, f"{name} is {shown(cell)}, expected a number", remedy)
            cells[at] = number


def other_orders(columns: Sequence[str], key: str) -> list[str]:
    """What to do where the rows of a table are not in the order of `key`."""
    others = [name for name in SELF_KEYS if name != key and "loss" in columns]
    return [f"if self sorted the tables by {name}: --sort {name}" for name in others]


def parse_score(cell: object) -> float | None:
    """The number of a cell, which may be NaN or infinite; None if it holds something else."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return float(cell) if abs(cell) < LARGEST_WHOLE else math.inf
    if isinstance(cell, str) and cell.isascii() and "_" not in cell:
        try:
            return float(cell)
        except ValueError:
            return None
    return cell if isinstance(cell, float) else None


def parse_whole_number(cell: object) -> int | None:
    """The whole number of a cell, in 64 bits; None if it holds something else."""
    if isinstance(cell, str) and WHOLE_NUMBER.fullmatch(cell):
        cell = int(cell)
    if isinstance(cell, int) and not isinstance(cell, bool) and abs(cell) < LARGEST_WHOLE:
        return cell
    return None


def part_of(columns: Sequence[str]) -> str | None:
    """The column of --by in a table of score; None where there is none."""
    return columns[4] if len(columns) > 4 and columns[4] in PARTS else None


def open_tables(names: Sequence[str], stdin: IO[str]) -> tuple[list[PartialTable], tuple[str, ...]]:
    """The tables and their columns.

    Raises UsageProblem for a file that can't be opened. Raises TableError for a table that is not
    of score or self, or whose columns differ from the first table's.
    """
    tables = [PartialTable(name, stdin) for name in names]
    with_columns = [table for table in tables if table.columns]
    for table in with_columns:
        columns = tuple(table.columns)
        by = part_of(columns)
        known = (score_columns(by), score_columns(by, True), self_columns(), self_columns(True))
        if columns not in known:
            raise TableError(
                f"{table.name} is not a table of score or self",
                f"found: {shown_names(columns)}",
                "give tables that score or self wrote",
            )
        if table.columns != with_columns[0].columns:
            raise TableError(
                f"{table.name} has other columns than {with_columns[0].name}",
                f"found:    {', '.join(table.columns)}",
                f"expected: {', '.join(with_columns[0].columns)}",
                "run the same command for each shard",
            )
    return tables, tuple(with_columns[0].columns) if with_columns else SCORE_COLUMNS


def merge_tables(
    tables: Sequence[PartialTable], columns: Sequence[str], k: int | None, sort: str = "score"
) -> Iterator[Row]:
    """Rows in the order of `score`, with new ranks: the k first of each query and kind, or all.
    `sort`: the column by which the tables of `self` are sorted.

    Raises TableError for a pair that comes twice.
    """
    rank_at, has_kinds = columns.index("rank"), "kind" in columns
    origins = PairOrigins()
    partials = [table.pairs(number, sort) for number, table in enumerate(tables) if table.columns]
    for rank, (section, key, train, (number, rows)) in merge_partial_rankings(partials):
        other = origins.add(section[0], train, number)
        if other is not None:
            of_query = f" of query {rows[0][0]}" if has_kinds else ""
            names = f"both {tables[other].name} and {tables[number].name}"
            raise TableError(
                f"training example {train}{of_query} is in {names}",
                "expected: each pair of a query and a training example in one table",
                "give the table of each shard once; n of --shard i/n must be the same in all",
            )
        if k is None or (rank <= k and not (has_kinds and key == 0)):  # 0: see has_all_pairs
            for row in rows:
                row[rank_at] = rank
                yield row


class PairOrigins:
    """Which table each training example of the current query comes from."""

    def __init__(self) -> None:
        self._query: int | None = None
        self._pages: dict[int, np.ndarray] = {}  # PAGE ids each; 0: no table, else 1 + its number

    def add(self, query: int, train: int, number: int) -> int | None:
        """Note that table `number` has a pair. Returns the table that has it already."""
        if query != self._query:
            self._query, self._pages = query, {}
        page_number, at = divmod(train, PAGE)
        page = self._pages.get(page_number)
        if page is None:
            page = self._pages[page_number] = np.zeros(PAGE, np.uint16)
        if page[at]:
            return int(page[at]) - 1
        page[at] = 1 + number
        return None


def find_top_of_parts(tables: Sequence[PartialTable], k: int | None) -> int | None:
    """The --top with which the tables seem to be written, if it is less than `k`; else None.

    Call it after all rows were read.
    """
    longest = max((table.longest for table in tables), default=0)
    were_cut = any(
        table.longest == longest and len(table.ends) > 1 and not table.has_all_pairs
        for table in tables
    )
    return longest if were_cut and longest and (k is None or k > longest) else None
