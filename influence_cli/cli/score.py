"""influence score: ranked proponents and opponents per query."""

from collections import deque
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags, given_flags
from influence_cli.cli.row_options import Candidates, QueryRows, given_elsewhere
from influence_cli.cli.torch_import import import_torch

if TYPE_CHECKING:
    from influence_cli.api.score import ScoreWork
    from influence_cli.output.tables import TableWriter


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
    plan = plan_scores(
        method, given_flags(method_flags), ScoreArguments(**vars(scored)), shown.top,
        specs.shard(shard), given_elsewhere(shared, candidates),
    )  # fmt: skip

    import_torch()
    from influence_cli.cli.opening import open_shared

    given = open_given_rows(rows.query or None, rows.query_file, queries, candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    write_scores(open_scores(opened, plan, queries, train), sink)


def write_scores(work: "ScoreWork", sink: "TableWriter") -> None:
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
