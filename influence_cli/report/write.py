"""Writes the page of some tables, with the pictures of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from influence_cli.output.tables import write_lines
from influence_cli.progress import Reporter, format_bytes
from influence_cli.report.example_list import ExampleList
from influence_cli.report.page import PageContent, render_page
from influence_cli.report.table_files import Table

if TYPE_CHECKING:
    from influence_cli.report.run_examples import PictureSource

LARGE_PAGE = 50 << 20  # bytes


def write_page(
    output: Path | None,
    title: str,
    tables: Sequence[Table],
    examples: ExampleList,
    source: "PictureSource | None",
    reporter: Reporter,
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
    size = len(page.encode(errors="backslashreplace"))
    if size > LARGE_PAGE:
        reporter.note(
            f"the page has {format_bytes(size)}, and browsers open it slowly: choose a smaller "
            "--top, or fewer tables"
        )
