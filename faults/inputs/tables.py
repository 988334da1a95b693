"""Labels and texts with control characters: written to each format and to a terminal."""

import csv
import io
import random
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from faults.inputs.target import Target, expect
from faults.mutate import random_text, strict_json
from faults.strategies import texts
from influence_cli.output.columns import SCORE_COLUMNS
from influence_cli.output.formats import read_rows
from influence_cli.output.tables import TableWriter
from influence_cli.output.terminal import print_rows
from influence_cli.output.trace_plot import print_trace

Rows = list[tuple[Any, ...]]  # Any: cells
# must not reach a terminal: controls, bidi overrides, line separators, lone surrogates
ACTING = frozenset(
    map(chr, (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029, 0xFEFF, *range(0xD800, 0xE000)))
)  # fmt: skip


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def make_rows(rng: random.Random) -> Rows:
    cells = [random_text(rng) for _ in range(4)]
    return [(0, "proponent", 1, 4, rng.uniform(-1, 1), *cells)]


row_lists = st.lists(st.tuples(texts, texts, texts, texts), min_size=1, max_size=3).map(
    lambda cells: [(0, "proponent", at, at, -0.5 * at, *row) for at, row in enumerate(cells, 1)]
)


def make_writer_target(format: str, folder: Path, weight: float) -> Target:
    """What is written comes back from an independent reader and from ours."""
    path = folder / f"table.{format}"

    def parse(rows: Rows) -> None:
        TableWriter.open(None, path).write(rows, SCORE_COLUMNS)
        wanted = [
            [str(cell).encode("utf-8", "backslashreplace").decode() for cell in row] for row in rows
        ]
        content = read_independently(path, format)
        expect([[str(cell) for cell in row] for row in content] == wanted, "read back otherwise")
        own = [cells for _, cells in read_rows(str(path), io.StringIO())][1:]
        expect([[str(cell) for cell in row] for row in own] == wanted, "our reader differs")

    return Target(f"texts to {format}", make_rows, parse, weight, strategy=row_lists)


def read_independently(path: Path, format: str) -> list[list[Any]]:  # Any: cells
    if format == "parquet":
        import pyarrow.parquet as pq

        return [list(row.values()) for row in pq.read_table(path).to_pylist()]
    with path.open(encoding="utf-8", newline="") as file:
        if format == "jsonl":
            return [list(strict_json(line).values()) for line in file.read().split("\n")[:-1]]
        return list(csv.reader(file, delimiter="," if format == "csv" else "\t"))[1:]


def expect_plain(text: str, allowed: str) -> None:
    bad = ACTING & set(text) - set(allowed)
    expect(not bad, f"prints U+{ord(min(bad, default=chr(0))):04X}")


def parse_terminal(rows: Rows) -> None:
    file = io.StringIO()
    print_rows(rows, SCORE_COLUMNS, file)
    expect_plain(file.getvalue(), "\n")


def parse_plain_terminal(rows: Rows) -> None:
    """csv, tsv and JSONL, when stdout is a terminal; and the title of a plot."""
    for format in ("csv", "tsv", "jsonl"):
        file = Terminal()
        TableWriter(format, None, file).write(rows, SCORE_COLUMNS)
        expect_plain(file.getvalue(), "\n\t")
    title = io.StringIO()
    print_trace(str(rows[0][5]), [(1, 1.0)], range(1, 3), title)
    expect_plain(title.getvalue(), "\n")


def make_targets(folder: Path) -> list[Target]:
    return [
        make_writer_target("csv", folder, 10),
        make_writer_target("tsv", folder, 10),
        make_writer_target("jsonl", folder, 10),
        make_writer_target("parquet", folder, 5),
        Target("texts to a terminal", make_rows, parse_terminal, 8, strategy=row_lists),
        Target("csv, tsv, jsonl to a terminal", make_rows, parse_plain_terminal, 10, strategy=row_lists),
    ]  # fmt: skip
