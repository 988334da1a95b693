"""Writes the page of some tables, with the pictures of a run."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.output.columns import Row
from influence_cli.output.table_record import MakeRecord, Record, describe_command
from influence_cli.output.tables import TableWriter, write_lines
from influence_cli.progress import Reporter, format_bytes
from influence_cli.report.example_list import ExampleList
from influence_cli.report.page import PageContent, render_page
from influence_cli.report.table_files import Table, collect_rows, describe_now, new_table

if TYPE_CHECKING:
    from influence_cli.report.run_examples import PictureSource

PAGE_TOP = 20  # proponents and opponents per query on a page
TITLE = "Influence report"
LARGE_PAGE = 50 << 20  # bytes


def write_page(
    output: Path | None,
    tables: Sequence[Table],
    examples: ExampleList,
    source: "PictureSource | None",
    reporter: Reporter,
    title: str = TITLE,
) -> None:
    """Write a page to a file, or to stdout. `source`: where pictures and missing texts come from.

    The file appears only when it is complete.
    """
    pictures = {}
    if source is not None:
        from influence_cli.report.run_examples import complete_examples  # imports torch

        pictures = complete_examples(examples, source, reporter)
    name = source.name if source is not None else ""
    page = render_page(PageContent(title, tables, examples, pictures, name))
    write_lines([page], output)
    if (size := len(page.encode())) > LARGE_PAGE:
        reporter.note(
            f"the page has {format_bytes(size)}, and browsers open it slowly: choose a smaller "
            "--top, or fewer tables"
        )


@dataclass(frozen=True)
class TablePage:
    """The page of one table that is not read from a file. `top`: of the table; None: all pairs."""

    output: Path
    source: "PictureSource"
    reporter: Reporter
    top: int | None

    def write(self, rows: Iterable[Row], columns: Sequence[str], record: Record) -> None:
        """Write the page of these rows."""
        table, examples = self.open_table(columns, record)
        deque(collect_rows(rows, table), maxlen=0)
        write_page(self.output, [table], examples, self.source, self.reporter)

    def open_table(self, columns: Sequence[str], record: Record) -> tuple[Table, ExampleList]:
        """A table without rows, and the list that its examples go to."""
        examples = ExampleList()
        table = new_table("", list(columns), record, examples, self.top or PAGE_TOP)
        table.written = describe_now()
        return table, examples


@dataclass(frozen=True)
class PagedTableWriter:
    """Writes a table, then the page of its rows."""

    sink: TableWriter
    page: TablePage

    def write(self, rows: Iterable[Row], columns: Sequence[str], made: MakeRecord) -> None:
        """Write both. A reader that closes the pipe of the table still gets the page."""
        page, content = self.page, made()
        table, examples = page.open_table(columns, {**describe_command(), **content})
        rows = collect_rows(rows, table)
        closed: BrokenPipeError | None = None
        try:
            self.sink.write(rows, columns, lambda: content)
        except BrokenPipeError as error:
            closed = error
            deque(rows, maxlen=0)
        write_page(page.output, [table], examples, page.source, page.reporter)
        if closed is not None:
            raise closed
