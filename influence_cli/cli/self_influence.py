"""influence self: suspected mislabelled or atypical training examples."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from influence_cli.cli import command, options
from influence_cli.cli.method_options import flags_group
from influence_cli.cli.row_options import Candidates, QueryRows
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.table import METHODS, describe_methods

if TYPE_CHECKING:
    from influence_cli.cli.opening import Opened
    from influence_cli.cli.requests import Rates
    from influence_cli.methods.declaration import Method as DeclaredMethod
    from influence_cli.methods.layer_aggregates import Aggregate
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.output.ranking import Entry


SELF_METHODS = {name: method for name, method in METHODS.items() if method.has_self}
SelfFlags = flags_group("Options", {name: method.options for name, method in SELF_METHODS.items()})
Method = Annotated[
    str,
    options.option(
        "--method", metavar="NAME", panel=options.RANKED, help=describe_methods(SELF_METHODS)
    ),
]


@command("self", example="influence self my_run --top 50 --format csv > suspects.csv", ranks=True)
def self_influence(
    shared: options.Shared,
    shown: options.Shown,
    method_flags: SelfFlags,  # type: ignore[valid-type]  # a class that is made from METHODS
    method: Method = options.DEFAULT_METHOD,
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

    The score is the influence of an example on itself, the loss its loss at the last checkpoint.
    """
    from influence_cli.cli import specs
    from influence_cli.output.columns import SELF_KEYS, self_columns, self_rows
    from influence_cli.output.tables import TableWriter

    chosen, own_options = choose_method(method, method_flags, (lr, lr_weights), candidates)
    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    top, part, rule = specs.top(shown.top), specs.shard(shard), specs.aggregate(aggregate)
    key = specs.one_of("--sort", sort or SELF_KEYS[0], SELF_KEYS)
    specs.check_aggregate(rule, part)
    import_torch()
    from influence_cli.cli.given_rows import open_given_rows
    from influence_cli.cli.opening import open_shared
    from influence_cli.cli.requests import score_request
    from influence_cli.cli.table_request import record_maker

    given = open_given_rows(QueryRows(), candidates=candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    all_ids = opened.ids("--train", train, "train")
    train_ids = opened.shard_ids(all_ids, part)
    flags = {"command": "self", "method": method, "options": own_options, "lr": lr}
    flags |= {"lr_weights": lr_weights, "sort": key, "aggregate": aggregate}
    made = record_maker(opened, flags, all_ids, range(0), part, top)
    columns = self_columns(opened.has_ids)
    if not len(train_ids):  # an empty shard
        return sink.write([], columns, made)
    request = score_request(opened, chosen, own_options, train_ids, range(0), (lr, lr_weights))
    entries = ranked_entries(opened, chosen, request, key, rule, top)
    if opened.ranks.rank == 0:
        sink.write(self_rows(entries, key, opened.describe, opened.has_ids), columns, made)
    opened.note_unverified("--verify compares all")
    opened.ranks.close()


def choose_method(
    name: str, method_flags: object, rates: "Rates", candidates: Path | None
) -> "tuple[DeclaredMethod, object]":
    """The method and its options. Raises UsageProblem for flags that it does not have."""
    from influence_cli.cli import specs
    from influence_cli.cli.method_options import method_options, refuse_flags

    method = SELF_METHODS[specs.one_of("--method", name, SELF_METHODS)]
    own_options = method_options(method, method_flags)
    lr, lr_weights = rates
    given = {"--lr": lr is not None, "--lr-weights": lr_weights is not None}
    refuse_flags(method, given | {"--candidates": candidates is not None})
    return method, own_options


def ranked_entries(
    opened: "Opened",
    method: "DeclaredMethod",
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
    source = opened.gradients
    sqnorms = method.open_sqnorms(source, request) if method.open_sqnorms else None
    rank_self_influence(source, request, ranking, key, rule, sqnorms)
    return ranking.entries(0)
