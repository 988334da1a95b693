"""Tables in a terminal: aligned, coloured, one line per row.

A page of rows is laid out at a time, so the first rows appear before the last are computed.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from influence_cli.output.columns import TEXT_PARTS, Row
from influence_cli.output.visible import escape_controls

PAGE = 1000  # rows that share the widths of their columns
GAP = 2  # spaces after each column
RIGHT_ALIGNED = frozenset(
    {"rank", "score", "loss", "query", "train", "step", "running", "value", "low", "high", "n"}
)
COLOURS = {"proponent": "green", "opponent": "red", "ok": "green", "FAILED": "red"}
COLOURED_COLUMNS = frozenset({"kind", "result"})
STRONG_WORD, WEAK_WORD = 0.25, 0.05  # shares of a pair's score: bold from here, dim below


def print_rows(rows: Iterable[Row], columns: Sequence[str], file: IO[str]) -> None:
    """Print the rows in pages. Labels and texts that the first page leaves empty have no column."""
    console = Console(file=file, highlight=False)
    rows = iter(rows)
    page = list(itertools.islice(rows, PAGE))
    shown = [
        at
        for at, name in enumerate(columns)
        if not name.endswith(("_label", "_text", "_id")) or any(row[at] for row in page)
    ]
    while True:
        widths = fit_widths(page, columns, shown, console.width)
        console.width = max(console.width, sum(widths.values()) + GAP * len(widths))
        console.print(format_page(page, columns, widths))
        page = list(itertools.islice(rows, PAGE))
        if not page:
            return


def fit_widths(
    page: Sequence[Row], columns: Sequence[str], shown: Sequence[int], width: int
) -> dict[int, int]:
    """Characters of each shown column, by its position. Texts are shortened, numbers never."""
    widths = {
        at: max(len(columns[at]), *(len(format_cell(row[at])) for row in page), 0) for at in shown
    }
    texts = [at for at in shown if columns[at].endswith("_text")]
    space = width - sum(widths[at] + GAP for at in shown if at not in texts)
    for at in texts:
        widths[at] = min(widths[at], max(len(columns[at]), space // len(texts) - GAP))
    return widths


def format_page(page: Sequence[Row], columns: Sequence[str], widths: dict[int, int]) -> Table:
    """The page as a table, with an empty line between queries."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, GAP, 0, 0))
    for at, width in widths.items():
        justify: Any = "right" if columns[at] in RIGHT_ALIGNED else "left"  # Any: rich's Literal
        table.add_column(
            Text(columns[at]), justify=justify, no_wrap=True, min_width=width, max_width=width
        )
    shares = word_shares(page, columns)
    for number, row in enumerate(page):
        if number and "query" in columns and row[0] != page[number - 1][0]:
            table.add_row()
        share = shares[number] if shares else None
        table.add_row(*styled_cells(row, columns, widths, share))
    return table


def styled_cells(
    row: Row, columns: Sequence[str], widths: dict[int, int], share: float | None
) -> Iterator[Text]:
    for at, width in widths.items():
        style = COLOURS.get(row[at], "") if columns[at] in COLOURED_COLUMNS else ""
        if share is not None and columns[at] in TEXT_PARTS:
            style = word_style(share)
        yield Text(shorten(format_cell(row[at]), width), style=style)


def word_shares(rows: Sequence[Row], columns: Sequence[str]) -> list[float]:
    """For each row the share of its word or token in its pair's total absolute score, with the
    score's sign.

    Empty if the rows are neither.
    """
    if not set(TEXT_PARTS) & set(columns):
        return []
    score = columns.index("score")
    totals: dict[Row, float] = {}
    for row in rows:
        totals[row[:4]] = totals.get(row[:4], 0.0) + abs(row[score])
    return [row[score] / totals[row[:4]] if totals[row[:4]] else 0.0 for row in rows]


def word_style(share: float) -> str:
    """Green for a word that raises the score, red for one that lowers it; brighter if stronger."""
    if not share:
        return "dim"
    strength = "bold " if abs(share) >= STRONG_WORD else "dim " if abs(share) < WEAK_WORD else ""
    return f"{strength}{'green' if share > 0 else 'red'}"


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else escape_controls(" ".join(str(value).split()))
