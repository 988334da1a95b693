"""influence merge: partial rankings into one."""

from typing import Annotated

from typer import Argument

from influence_cli.cli import command, options

Parts = Annotated[
    list[str],
    Argument(
        metavar="PART...",
        help=(
            "Tables of score or self: csv, tsv, jsonl or parquet by their names; - is csv from "
            "stdin."
        ),
    ),
]


@command("merge", example="influence merge part-*.csv -o scores.csv")
def merge(parts: Parts, shown: options.Shown, quiet: options.Quiet = False) -> None:
    """Tables that score or self wrote with --shard, merged into the one of all training examples.

    Ranked anew, with every digit: what a run without shards gives. Parts were made with a --top at
    least as large as the one here.
    """
    import sys

    from influence_cli.cli import specs
    from influence_cli.cli.stderr_reporter import StderrReporter
    from influence_cli.errors import UsageProblem
    from influence_cli.output import merge, tables
    from influence_cli.progress import Reporter

    sink = tables.TableWriter.open(shown.format, shown.output)
    k = specs.top(shown.top)
    if parts.count("-") > 1:
        raise UsageProblem("two parts are -, stdin is read once", "put one of them into a file")
    reporter = Reporter() if quiet else StderrReporter()
    opened, columns = merge.open_parts(parts, sys.stdin)
    sink.write(merge.merged(opened, columns, k), columns)
    for part in opened:
        if not part.longest:
            reporter.note(f"{part.name} has no rows")
    if (most := merge.shortened(opened, k)) is not None:
        reporter.note(
            f"the parts have at most {most} rows of each kind and query: with --top {shown.top} "
            "they might have had more"
        )
