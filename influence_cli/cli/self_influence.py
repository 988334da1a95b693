"""influence self: suspected mislabelled or atypical training examples."""

from influence_cli.cli import command, options


@command("self", example="influence self my_run --top 50 --format csv > suspects.csv", ranks=True)
def self_influence(
    shared: options.Shared,
    shown: options.Shown,
    train: options.Train = None,
    shard: options.Shard = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
) -> None:
    """Which training examples influence their own prediction most? Wrong labels and odd examples come first.

    The score is TracIn's of an example on itself; it needs gradient norms only, which are small to keep.
    """
    from influence_cli.cli import specs
    from influence_cli.output import tables

    sink = tables.TableWriter.open(shown.format, shown.output)
    k = specs.top(shown.top)
    part = specs.shard(shard)

    from influence_cli.cli.opening import open_shared
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.methods.tracin import self_influence
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

    opened = open_shared(shared, trajectory)
    train_ids = opened.train_ids(train, part)
    if not len(train_ids):  # an empty shard
        sink.write([], tables.SELF_COLUMNS)
        return
    question = ScoreRequest(
        opened.checkpoints, opened.weights(lr, lr_weights), opened.columns, train_ids
    )
    ranking: Ranking = TopRanking(1, 0, k, signed=False) if k is not None else FullRanking(1, 0)
    self_influence(opened.gradients, question, ranking)
    if opened.ranks.rank == 0:
        sink.write(tables.self_rows(ranking.entries(0), opened.describe), tables.SELF_COLUMNS)
    opened.ranks.close()
