"""influence score: ranked proponents and opponents per query."""

import sys
from pathlib import Path

from influence_cli.cli import app, options, reporting
from influence_cli.methods import METHODS


@app.command(epilog="Example: influence score my_run --queries 0:5 --top 3 | column -s, -t")
@reporting
def score(
    run: options.Run = Path("."),
    method: options.Method = "tracin",
    queries: options.Queries = None,
    train: options.Train = None,
    steps: options.Steps = None,
    layers: options.Layers = None,
    sum_queries: options.SumQueries = False,
    group_by: options.GroupBy = None,
    by: options.By = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    normalize: options.Normalize = False,
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
    """Which training examples lowered each query's loss (proponents), and which raised it (opponents)?

    Missing gradients are computed and cached first; a stopped run goes on where it was. Score above 0: proponent.
    """
    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output import tables

    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    stdout = sys.__stdout__ or sys.stdout
    shape = tables.chosen_format(format, output, stdout.isatty())
    tables.check(shape, output, stdout.isatty())
    k = specs.top(top)
    if by is not None and by not in chosen.parts:
        raise UsageProblem(f"--by {by}: the scores of {method} have no such parts", f"expected: {', '.join(chosen.parts)}")
    specs.check_stdin(queries, train)
    if not chosen.weighted and (lr is not None or lr_weights is not None):
        raise UsageProblem(f"--method {method} has no learning-rate weights", "leave out --lr and --lr-weights, or use --method tracin")

    from influence_cli.cli.opening import Shared, open_shared
    from influence_cli.methods import Question
    from influence_cli.output.ranking import FullRanking, Ranking, TopRanking
    from influence_cli.run.learning_rates import weigh

    opened = open_shared(
        Shared(run, definition, checkpoints, trajectory, cache, steps, layers, device, batch_size, precision, store, quiet)
    )
    selected = opened.checkpoints
    if chosen.checkpoints == "one":
        if steps is not None and len(selected) > 1:
            raise UsageProblem(f"--method {method} reads one checkpoint, --steps {steps} selects {len(selected)}", "name one step")
        selected = selected[-1:]
    weights = opened.weights(lr, lr_weights) if chosen.weighted else tuple(weigh(selected, None, "none"))
    train_ids = opened.ids("--train", train, "train")
    question = Question(
        selected, weights, opened.columns, train_ids, opened.ids("--queries", queries, "query"),
        sum_queries, normalize or chosen.normalized, by, opened.groups(group_by, train_ids) if group_by else None,
    )  # fmt: skip

    def new_ranking(width: int, parts: int) -> Ranking:
        return TopRanking(width, parts, k) if k is not None else FullRanking(width, parts)

    rows = (
        row
        for answer in chosen.score()(opened.gradients, question, new_ranking)
        for row in tables.score_rows(
            answer.ranking, answer.queries, by, answer.parts, question.groups.names if question.groups else None, opened.describe
        )
    )
    tables.write(rows, tables.score_columns(by), shape, output, stdout)
