"""influence merge: one table from the tables of shards."""

import os
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from influence_cli.cli import command, options

if TYPE_CHECKING:
    from influence_cli.output.table_record import Record

Parts = Annotated[
    list[str],
    Argument(
        metavar="PART...",
        help=(
            "Tables that score or self wrote: csv, tsv, jsonl or parquet by their file names; "
            "- reads csv from stdin."
        ),
    ),
]


@command("merge", example="influence merge part-*.csv -o scores.csv")
def merge(
    parts: Parts, shown: options.Shown, sort: options.Sort = None, quiet: options.Quiet = False
) -> None:
    """Merge the tables that score or self wrote with --shard into one.

    The result is the table of a run without shards, with every digit. Write the parts with a --top
    at least as large as the one given here.
    """
    import sys

    from influence_cli.api import specs
    from influence_cli.errors import listed
    from influence_cli.output.merge import find_top_of_parts, merge_tables, open_tables
    from influence_cli.output.part_records import check_parts
    from influence_cli.output.stderr_reporter import StderrReporter
    from influence_cli.output.tables import TableWriter
    from influence_cli.progress import Reporter

    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    k = specs.top(shown.top)
    refuse_repeated(parts)
    reporter = Reporter() if quiet else StderrReporter()
    tables, columns = open_tables(parts, sys.stdin)
    checked = check_parts(parts, k, shown.top)
    key = sort_key(sort, columns, checked.request)
    is_known = checked.request and not checked.without_record
    made = {"request": checked.request, "shard": None, "top": k} if is_known else {}
    sink.write(merge_tables(tables, columns, k, key), columns, lambda: made)
    if checked.without_record:
        reporter.note(
            f"no record of how {listed(checked.without_record)} was made: merge can't check that "
            "the parts complete each other. Write them with -o, and keep their .meta.json files."
        )
    for table in tables:
        if not table.longest:
            reporter.note(f"{table.name} has no rows")
    if (top_of_parts := find_top_of_parts(tables, k)) is not None:
        reporter.note(
            f"the tables hold at most {top_of_parts} rows per query and kind, so rows of --top "
            f"{shown.top} may be missing. Write them with --top {shown.top} or more."
        )


def sort_key(sort: str | None, columns: tuple[str, ...], request: "Record | None") -> str:
    """The column by which the parts are sorted: their records know it, or --sort names it."""
    from influence_cli.api import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output.columns import SELF_KEYS

    if sort is not None and "loss" not in columns:
        raise UsageProblem(f"--sort {sort}: the tables of score have one order", "leave it out")
    recorded = (request or {}).get("sort")
    key = specs.one_of("--sort", sort or recorded or SELF_KEYS[0], SELF_KEYS)
    if (actual := recorded or key) != key:
        raise UsageProblem(
            f"--sort {sort}: self wrote the parts with --sort {actual}", f"give --sort {actual}"
        )
    return key


def refuse_repeated(parts: list[str]) -> None:
    """Raises UsageProblem where two parts are the same file, by any name, or both stdin."""
    from influence_cli.errors import UsageProblem

    if parts.count("-") > 1:
        raise UsageProblem(
            "two parts are -, but stdin can be read only once", "write one of them to a file"
        )
    names: dict[str, str] = {}  # real path -> the name that the user gave
    for part in parts:
        path = os.path.realpath(part)
        if path in names:
            other = "" if names[path] == part else f", also as {names[path]}"
            raise UsageProblem(
                f"{part} is given twice{other}",
                "expected: each table once",
                "leave one of them out",
            )
        names[path] = part
