"""influence score: ranked proponents and opponents per query."""

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags, given_flags
from influence_cli.cli.row_options import Candidates, QueryRows, given_elsewhere
from influence_cli.cli.torch_import import import_torch

if TYPE_CHECKING:
    from influence_cli.api.score import ScoreWork
    from influence_cli.output.tables import TableWriter
    from influence_cli.report.write import PagedTableWriter

Report = Annotated[
    Path | None,
    options.option(
        "--report",
        panel=options.OUT,
        metavar="FILE",
        help="Write an HTML page of the table, too; see influence report.",
    ),
]


@command(
    "score", example="influence score my_run --queries 0:5 --top 3 | column -s, -t", ranks=True
)
def score(
    shared: options.Shared,
    scored: options.Scored,
    shown: options.Shown,
    rows: QueryRows,
    method_flags: MethodFlags,  # type: ignore[valid-type]  # a class that is made from METHODS
    method: options.Method = options.DEFAULT_METHOD,
    queries: options.Queries = None,
    train: options.Train = None,
    candidates: Candidates = None,
    shard: options.Shard = None,
    trajectory: options.Trajectory = None,
    verify: options.Verify = False,
    report: Report = None,
) -> None:
    """Which training examples lowered each query's loss (proponents), and which raised it?

    A score above 0 is a proponent, below 0 an opponent. score computes and caches the
    gradients that the cache lacks. If it is interrupted, run the same command to resume.
    """
    from influence_cli.api import specs
    from influence_cli.api.given_rows import open_given_rows
    from influence_cli.api.score import ScoreArguments, open_scores, plan_scores
    from influence_cli.output.tables import TableWriter

    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    specs.check_stdin(queries, train)
    check_report(report, shown.output, shard)
    plan = plan_scores(
        method, given_flags(method_flags), ScoreArguments(**vars(scored)), shown.top,
        specs.shard(shard), given_elsewhere(shared, candidates),
    )  # fmt: skip

    import_torch()
    from influence_cli.cli.opening import open_shared

    given = open_given_rows(rows.query or None, rows.query_file, queries, candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    work = open_scores(opened, plan, queries, train)
    write_scores(work, sink if report is None else add_page(sink, report, work))


def check_report(report: Path | None, output: Path | None, shard: str | None) -> None:
    """Raises UsageProblem for a page that can't be written, before any work."""
    if report is None:
        return
    from influence_cli.errors import UsageProblem
    from influence_cli.output.tables import check_file_name
    from influence_cli.report.page import require_jinja

    require_jinja()
    check_file_name(report, "--report")
    if shard is not None:
        raise UsageProblem(
            "--report needs the scores of all examples, and --shard computes a part",
            "merge the parts, then: influence report scores.csv -o page.html",
        )
    if output is not None and output.absolute() == report.absolute():
        raise UsageProblem(f"-o and --report both name {report}", "name two files")


def add_page(sink: "TableWriter", report: Path, work: "ScoreWork") -> "PagedTableWriter":
    """A writer of the table and of its page."""
    from influence_cli.api.score_tables import open_page
    from influence_cli.report.write import PagedTableWriter

    opened = work.opened
    return PagedTableWriter(sink, open_page(report, opened, work.plan.top, opened.reporter))


def write_scores(work: "ScoreWork", sink: "TableWriter | PagedTableWriter") -> None:
    """Compute the rows and write them. Every rank calls it; rank 0 writes."""
    opened, method = work.opened, work.plan.method
    ranks, rows = opened.ranks, work.rows(work.compute())
    if ranks.count == 1 or (method.ranks_share == "scores" and not ranks.rank):
        sink.write(rows, work.columns, work.made)
    elif method.ranks_share == "scores":
        deque(rows, maxlen=0)  # computes this rank's share; rank 0 receives the scores
    elif ranks.rank:
        opened.gradients.serve()
    else:
        opened.reporter.note(
            f"all {ranks.count} ranks compute gradients for {method.name}; rank 0 computes scores"
        )
        with opened.gradients.serving():
            sink.write(rows, work.columns, work.made)
    opened.note_unverified("--verify compares all")
    ranks.close()
