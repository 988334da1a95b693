"""influence self: suspected mislabelled or atypical training examples."""

import sys
from pathlib import Path

from influence_cli.cli import app, options, reporting


@app.command("self", epilog="Example: influence self my_run --top 50 --format csv > suspects.csv")
@reporting
def self_influence(
    run: options.Run = Path("."),
    train: options.Train = None,
    steps: options.Steps = None,
    layers: options.Layers = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    precision: options.Precision = None,
    store: options.StoreAs = None,
    device: options.Device = "auto",
    batch_size: options.BatchSize = "auto",
    definition: options.Definition = None,
    checkpoints: options.Checkpoints = None,
    trajectory: options.Trajectory = None,
    cache: options.Cache = None,
    top: options.Top = "10",
    format: options.Format = None,
    output: options.Output = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
) -> None:
    """Which training examples influence their own prediction most? Wrong labels and odd examples come first.

    The score is TracIn's of an example on itself; it needs gradient norms only, which are small to keep.
    """
    from influence_cli.cli import specs
    from influence_cli.output import tables

    stdout = sys.__stdout__ or sys.stdout
    shape = tables.chosen_format(format, output, stdout.isatty())
    tables.check(shape, output, stdout.isatty())
    k = specs.top(top)

    from influence_cli.cli.opening import Shared, open_shared
    from influence_cli.methods import Question
    from influence_cli.methods.tracin import self_influence
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

    opened = open_shared(
        Shared(run, definition, checkpoints, trajectory, cache, steps, layers, device, batch_size, precision, store, quiet)
    )
    question = Question(opened.checkpoints, opened.weights(lr, lr_weights), opened.columns, opened.ids("--train", train, "train"))
    ranking: Ranking = TopRanking(1, 0, k, signed=False) if k is not None else FullRanking(1, 0)
    self_influence(opened.gradients, question, ranking)
    tables.write(tables.self_rows(ranking.entries(0), opened.describe), tables.SELF_COLUMNS, shape, output, stdout)
