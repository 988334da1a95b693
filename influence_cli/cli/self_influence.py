"""influence self: suspected mislabelled or atypical training examples."""

from typing import Annotated

from influence_cli.cli import command, options
from influence_cli.cli.method_options import flags_group, given_flags
from influence_cli.cli.row_options import Candidates
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.table import SELF_METHODS, describe_methods

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
    from influence_cli.api import specs
    from influence_cli.api.given_rows import open_given_rows
    from influence_cli.api.score import ScoreArguments
    from influence_cli.api.self_influence import check_sort, open_self, plan_self
    from influence_cli.output.tables import TableWriter

    sink = TableWriter.open(shown.format, shown.output, safe_cells=shown.safe_cells)
    scored = ScoreArguments(lr=lr, lr_weights=lr_weights, aggregate=aggregate)
    own_flags, part = given_flags(method_flags), specs.shard(shard)
    plan = plan_self(method, own_flags, scored, shown.top, part, candidates is not None)
    key = check_sort(sort)
    import_torch()
    from influence_cli.cli.opening import open_shared

    given = open_given_rows(candidates=candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    work = open_self(opened, plan, key, train)
    entries = work.compute()
    if opened.ranks.rank == 0:
        sink.write(work.rows(entries), work.columns, work.made)
    opened.note_unverified("--verify compares all")
    opened.ranks.close()
