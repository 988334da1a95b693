"""influence trace: influence over training time."""

import dataclasses

from influence_cli.cli import command, options


@command("trace", example="influence trace my_run --queries 3 --train 17")
def trace(
    shared: options.Shared,
    values: options.Values,
    method: options.Method = "dve",
    queries: options.Queries = None,
    train: options.Traced = None,
    sum_queries: options.SumQueries = False,
    trajectory: options.Trajectory = None,
    format: options.PlotFormat = None,
    output: options.Output = None,
) -> None:
    """When in training was a query's loss made what it is? Scores by step: of each step's whole batch, and of single examples.

    In a terminal a plot, in a pipe csv: train is `all` for a whole step; running is the sum of score up to that step.
    """
    import sys

    from influence_cli.cli import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.methods.table import METHODS
    from influence_cli.output import tables

    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    if not chosen.ordered:
        known = ", ".join(name for name, other in METHODS.items() if other.ordered)
        raise UsageProblem(
            f"--method {method}: its scores have no place in training time", f"expected: {known}"
        )
    stdout = sys.__stdout__ or sys.stdout
    plotted = format == "plot" or (format is None and output is None and stdout.isatty())
    if format == "plot" and output is not None:
        raise UsageProblem("--format plot is for a terminal, -o is a file", "give one of them")
    sink = tables.TableWriter.open("csv" if plotted else format, output)
    specs.check_stdin(queries, train)
    specs.check_values(method, chosen.curvatures, values, False)
    specs.check_projected(method, chosen, shared.project)

    from influence_cli.cli.opening import open_shared
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.run.learning_rates import weigh_checkpoints

    opened = open_shared(shared, trajectory)
    examples = opened.ids("--train", train, "train") if train is not None else range(0)
    question = ScoreRequest(
        opened.checkpoints,
        tuple(weigh_checkpoints(opened.checkpoints, None, "none")),
        opened.columns,
        examples,
        opened.ids("--queries", queries, "query"),
        sum_queries,
        values=chosen.options(**dataclasses.asdict(values)),
    )
    found = (
        (
            None if sum_queries else int(ids[position]),
            None if example is None else int(example),
            traced,
            position,
        )
        for ids, traced in chosen.trace()(opened.gradients, question)
        for position in range(1 if sum_queries else len(ids))
        for example in (None, *examples)
    )

    def named(split: str, index: int) -> str:
        label = opened.describe(split, index)[0]
        return f"{split} {index} ({label})" if label else f"{split} {index}"

    if plotted:
        from influence_cli.output.trace_plot import trace_plot

        with tables.to_stdout(stdout):
            for query, example, traced, position in found:
                about = "all queries" if query is None else named("query", query)
                of = "every step" if example is None else named("train", example)
                series = traced.series(position, example)
                title = f"{about}, {of}: {sum(score for _, score in series):.4g}"
                trace_plot(
                    title, series, range(traced.first, traced.first + len(traced.sums)), stdout
                )
        return

    def rows():
        for query, example, traced, position in found:
            labels = [
                opened.describe(s, i)[0] if i is not None else ""
                for s, i in (("query", query), ("train", example))
            ]
            running = 0.0
            for step, score in traced.series(position, example):
                running += score
                yield (
                    "all" if query is None else query,
                    "all" if example is None else example,
                    step,
                    score,
                    running,
                    *labels,
                )

    sink.write(rows(), tables.TRACE_COLUMNS)
