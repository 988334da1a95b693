"""influence report: one HTML page of score tables."""

from pathlib import Path
from typing import Annotated

from typer import Argument

from influence_cli.cli import command, options

Tables = Annotated[
    list[str],
    Argument(
        metavar="SCORES...",
        help=(
            "Tables that score, self, trace or evaluate wrote: csv, tsv, jsonl or parquet by "
            "their file names; - reads csv from stdin. Tables that differ in --by alone are shown "
            "together."
        ),
    ),
]
PictureRun = Annotated[
    Path | None,
    options.option(
        "--run",
        panel=options.RUN,
        metavar="RUN",
        help="Folder of the run that the tables are of, for the pictures of image(example) and for "
        "labels and texts that the tables lack. influence runs the Python code of its "
        "definition.py.",
    ),
]
Top = Annotated[
    str,
    options.option(
        "--top",
        panel=options.OUT,
        metavar="N",
        help="Number of proponents and of opponents per query on the page, or all.",
    ),
]
Title = Annotated[
    str | None,
    options.option("--title", panel=options.OUT, metavar="TEXT", help="Title of the page."),
]


@command("report", example="influence report scores.parquet self.csv --run my_run -o page.html")
def report(
    tables: Tables,
    run: PictureRun = None,
    definition: options.Definition = None,
    top: Top = "20",  # PAGE_TOP of report/write.py
    title: Title = None,
    output: options.Output = None,
    quiet: options.Quiet = False,
) -> None:
    """Write one HTML page of score tables, to look at queries, their proponents and opponents.

    The page is a single file. It asks no server for anything, so you can mail it or open it
    offline. It needs the extra report: pip install 'influence-cli[report]'.
    """
    import sys

    from influence_cli.api import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output.stderr_reporter import StderrReporter
    from influence_cli.output.tables import check_file_name
    from influence_cli.progress import Reporter
    from influence_cli.report.example_list import ExampleList
    from influence_cli.report.page import require_jinja
    from influence_cli.report.table_files import note_other_runs, read_table
    from influence_cli.report.write import TITLE, write_page

    require_jinja()
    limit = specs.top(top)
    if tables.count("-") > 1:
        raise UsageProblem("- stands twice, and stdin is one table", "name a file for the other")
    if definition is not None and run is None:
        raise UsageProblem("--definition needs --run", "add --run RUN")
    if output is not None:
        check_file_name(output)
    elif sys.__stdout__ is not None and sys.__stdout__.isatty():
        raise UsageProblem("the page needs a file, and stdout is a terminal", "add -o page.html")
    reporter = Reporter() if quiet else StderrReporter()
    examples = ExampleList()
    contents = [read_table(name, sys.stdin, examples, limit) for name in tables]
    note_other_runs(contents, reporter)
    source = None
    if run is not None:
        from influence_cli.cli.torch_import import import_torch

        import_torch()
        from influence_cli.report.run_examples import note_missing_pictures, open_source

        source = open_source(run, definition, [table.record or {} for table in contents])
        note_missing_pictures(source, reporter)
    write_page(output, contents, examples, source, reporter, title or TITLE)
