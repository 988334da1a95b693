"""influence self: suspected mislabelled or atypical training examples."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from influence_cli.cli import command, options
from influence_cli.cli.row_options import Candidates, QueryRows
from influence_cli.cli.torch_import import import_torch

if TYPE_CHECKING:
    from influence_cli.cli.opening import Opened
    from influence_cli.methods.layer_aggregates import Aggregate
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.output.ranking import Entry


@command("self", example="influence self my_run --top 50 --format csv > suspects.csv", ranks=True)
def self_influence(
    shared: options.Shared,
    shown: options.Shown,
    train: options.Train = None,
    candidates: Candidates = None,
    shard: options.Shard = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    sort: options.Sort = None,
    aggregate: options.Aggregate = None,
    trajectory: options.Trajectory = None,
    verify: options.Verify = False,
) -> None:
    """Which training examples influence their own prediction most? Wrong labels come first.

    The score is the influence of an example on itself, summed over checkpoints. The loss is the
    example's at the last checkpoint. Both need gradient norms only, which take little disk space.
    """
    from influence_cli.cli import specs
    from influence_cli.output.columns import SELF_KEYS, self_columns, self_rows
    from influence_cli.output.tables import TableWriter

    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    top, part, rule = specs.top(shown.top), specs.shard(shard), specs.aggregate(aggregate)
    key = specs.one_of("--sort", sort or SELF_KEYS[0], SELF_KEYS)
    specs.check_aggregate(rule, part)

    import_torch()
    from influence_cli.cli.given_rows import open_given_rows
    from influence_cli.cli.opening import open_shared
    from influence_cli.cli.table_request import record_maker
    from influence_cli.methods.request import ScoreRequest

    given = open_given_rows(QueryRows(), candidates=candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    all_ids = opened.ids("--train", train, "train")
    train_ids = opened.shard_ids(all_ids, part)
    flags = {"lr": lr, "lr_weights": lr_weights, "sort": key, "aggregate": aggregate}
    made = record_maker(opened, {"command": "self"} | flags, all_ids, range(0), part, top)
    columns = self_columns(opened.has_ids)
    if not len(train_ids):  # an empty shard
        sink.write([], columns, made)
        return
    weights = opened.weights(lr, lr_weights)
    request = ScoreRequest(opened.checkpoints, weights, opened.columns, train_ids)
    entries = ranked_entries(opened, request, key, rule, top)
    if opened.ranks.rank == 0:
        sink.write(self_rows(entries, key, opened.describe, opened.has_ids), columns, made)
    opened.note_unverified("--verify compares all")
    opened.ranks.close()


def ranked_entries(
    opened: "Opened",
    request: "ScoreRequest",
    key: str,
    rule: "Aggregate | None",
    top: int | None,
) -> "Iterator[Entry]":
    """The `top` first entries by score or loss, or all. Rank 0 has them."""
    from influence_cli.methods.self_influence import rank_self_influence
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

    ranking: Ranking = (
        FullRanking(1, 1, signed=False) if top is None else TopRanking(1, 1, top, signed=False)
    )
    rank_self_influence(opened.gradients, request, ranking, key, rule)
    return ranking.entries(0)
