"""influence score: ranked proponents and opponents per query."""

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags
from influence_cli.cli.row_options import Candidates, QueryRows
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.table import METHODS

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.cli.opening import Opened
    from influence_cli.methods.declaration import Method
    from influence_cli.methods.layer_aggregates import Aggregate
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.output.table_record import MakeRecord
    from influence_cli.output.tables import TableWriter
    from influence_cli.parallel.shards import Shard


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
    from influence_cli.cli import specs
    from influence_cli.cli.given_rows import open_given_rows
    from influence_cli.cli.method_options import refuse_flags
    from influence_cli.output.tables import TableWriter

    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    specs.check_stdin(queries, train)
    top, part, rule = specs.top(shown.top), specs.shard(shard), specs.aggregate(scored.aggregate)
    own_options = checked_options(chosen, method_flags, shared, scored, part)
    refuse_flags(chosen, {"--candidates": candidates is not None})
    specs.check_aggregate(rule, part, chosen, scored.by)

    import_torch()
    from influence_cli.cli.opening import open_shared
    from influence_cli.cli.table_request import record_maker

    given = open_given_rows(rows, queries, candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    all_ids = opened.ids("--train", train, "train")
    train_ids = opened.shard_ids(all_ids, part)
    query_ids = opened.query_ids(queries)
    flags = score_flags(chosen, own_options, scored)
    made = record_maker(opened, flags, all_ids, query_ids, part, top)
    if not len(train_ids):  # an empty shard
        return write_scores(opened, chosen, iter(()), sink, scored.by, made)
    request = request_of(opened, chosen, own_options, scored, train_ids, query_ids)
    table_rows = score_rows(opened, chosen, request, rule, top)
    write_scores(opened, chosen, table_rows, sink, scored.by, made)


def score_flags(method: "Method", own_options: object, scored: options.Scored) -> dict[str, object]:
    """What a record says of the flags."""
    scores = dataclasses.asdict(scored)
    return {"command": "score", "method": method.name, "options": own_options, **scores}


def request_of(
    opened: "Opened",
    method: "Method",
    own_options: object,
    scored: options.Scored,
    train: "Ids",
    queries: "Ids",
) -> "ScoreRequest":
    """The request to the method: these examples, and the flags of the scores."""
    from influence_cli.cli.requests import score_request

    return score_request(
        opened,
        method,
        own_options,
        train=train,
        queries=queries,
        rates=(scored.lr, scored.lr_weights),
        sum_queries=scored.sum_queries,
        normalize=scored.normalize,
        by=scored.by,
        group_by=scored.group_by,
    )


def checked_options(
    method: "Method",
    method_flags: object,
    shared: options.Shared,
    scored: options.Scored,
    part: "Shard | None",
) -> object:
    """The method's options. Raises UsageProblem for flags that it does not have."""
    from influence_cli.cli import specs
    from influence_cli.cli.method_options import method_options, refuse_flags

    specs.check_by(scored.by, method, scored.group_by)
    own_options = method_options(method, method_flags)
    given = {
        "--layers": bool(shared.layers),
        "--project": shared.project is not None,
        "--lr": scored.lr is not None,
        "--lr-weights": scored.lr_weights is not None,
        "--normalize": scored.normalize,
        "--shard": part is not None,
    }
    refuse_flags(method, given)
    specs.check_shard(part, scored.group_by)
    return own_options


def score_rows(
    opened: "Opened",
    method: "Method",
    request: "ScoreRequest",
    rule: "Aggregate | None",
    top: int | None,
) -> Iterator[Sequence[object]]:
    """The rows of the table, query by query. `top`: rows of each kind and query, None: all."""
    from influence_cli.methods.layer_aggregates import score_layers
    from influence_cli.output import columns
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

    def new_ranking(queries: int, parts: int) -> Ranking:
        return FullRanking(queries, parts) if top is None else TopRanking(queries, parts, top)

    names = request.groups.names if request.groups else None
    for scored in score_layers(method, opened.gradients, request, new_ranking, rule):
        yield from columns.score_rows(
            scored.ranking,
            scored.queries,
            request.by,
            scored.parts,
            names,
            opened.describe,
            scored.split,
            opened.has_ids,
        )


def write_scores(
    opened: "Opened",
    method: "Method",
    rows: Iterator[Sequence[object]],
    sink: "TableWriter",
    by: str | None,
    made: "MakeRecord",
) -> None:
    """Compute the rows and write them. Every rank calls it; rank 0 writes."""
    from influence_cli.output.columns import score_columns

    ranks, columns = opened.ranks, score_columns(by, opened.has_ids)
    if ranks.count == 1 or (method.ranks_share == "scores" and not ranks.rank):
        sink.write(rows, columns, made)
    elif method.ranks_share == "scores":
        deque(rows, maxlen=0)  # computes this rank's share; rank 0 receives the scores
    elif ranks.rank:
        opened.gradients.serve()
    else:
        opened.reporter.note(
            f"all {ranks.count} ranks compute gradients for {method.name}; rank 0 computes scores"
        )
        with opened.gradients.serving():
            sink.write(rows, columns, made)
    opened.note_unverified("--verify compares all")
    ranks.close()
