"""influence trace: influence over training time."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Annotated

from influence_cli.cli import command, options
from influence_cli.cli.method_options import MethodFlags, given_flags
from influence_cli.cli.row_options import QueryRows
from influence_cli.cli.torch_import import import_torch
from influence_cli.errors import UsageProblem
from influence_cli.methods.table import METHODS, describe_methods

if TYPE_CHECKING:
    from influence_cli.api.opening import Opened
    from influence_cli.methods.declaration import Method as TracedMethod
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.methods.reverse.occurrences import Trace
    from influence_cli.output.tables import TableWriter

TRACED = tuple(name for name, method in METHODS.items() if method.trace is not None)
Method = Annotated[
    str,
    options.option("--method", metavar="NAME", panel=options.RANKED, help=describe_methods(TRACED)),
]
Traced = Annotated[
    str | None,
    options.option(
        "--train",
        metavar="SPEC",
        panel=options.RANKED,
        help="Training examples to trace, in addition to whole steps: 0,5,10:20, "
        "@ids.txt or - (stdin).",
    ),
]
PlotFormat = Annotated[
    str | None,
    options.option(
        "--format",
        panel=options.OUT,
        metavar="NAME",
        help="Output format: plot, table, csv, tsv, jsonl or parquet. [default: plot "
        "in a terminal, csv in a pipe]",
    ),
]


@command("trace", example="influence trace my_run --queries 3 --train 17")
def trace(
    shared: options.Shared,
    rows: QueryRows,
    method_flags: MethodFlags,  # type: ignore[valid-type]  # a class that is made from METHODS
    method: Method = TRACED[0],
    queries: options.Queries = None,
    train: Traced = None,
    sum_queries: options.SumQueries = False,
    trajectory: options.Trajectory = None,
    format: PlotFormat = None,
    output: options.Output = None,
) -> None:
    """When during training did a query's loss change? Shows scores by step.

    Rows with train = all show a step's whole batch; --train adds rows for single examples.
    running is the sum of scores up to the step. The output is a plot in a terminal, CSV in a pipe.
    """
    from influence_cli.api import specs
    from influence_cli.api.given_rows import open_given_rows
    from influence_cli.api.method_options import method_options, refuse_flags
    from influence_cli.api.score import ScoreArguments
    from influence_cli.output.tables import TableWriter

    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    if chosen.trace is None:
        known = f"expected: {', '.join(TRACED)}"
        raise UsageProblem(f"--method {method} has no scores by step of training", known)
    stdout = sys.__stdout__ or sys.stdout
    plotted = format == "plot" or (format is None and output is None and stdout.isatty())
    if format == "plot" and output is not None:
        raise UsageProblem("--format plot is for a terminal, -o is a file", "give one of them")
    sink = TableWriter.open("csv" if plotted else format, output)
    specs.check_stdin(queries, train)
    own_options = method_options(chosen, given_flags(method_flags))
    refuse_flags(chosen, {"--project": shared.project is not None, "--layers": bool(shared.layers)})

    import_torch()
    from influence_cli.api.requests import score_request
    from influence_cli.cli.opening import open_shared

    given = open_given_rows(rows.query or None, rows.query_file, queries)
    opened = open_shared(shared, trajectory, given=given)
    traced = opened.ids("--train", train, "train") if train is not None else range(0)
    ids = traced, opened.query_ids(queries)
    scores = ScoreArguments(sum_queries=sum_queries)
    request = score_request(opened, chosen, own_options, *ids, scores)
    write_trace(opened, traced_scores(opened, chosen, request), sink, stdout if plotted else None)
    opened.note_unverified()


@dataclass(frozen=True)
class TracedPair:
    """Scores over training time. `query` None: all queries; `example` None: each step's batch."""

    query: int | None
    example: int | None
    position: int  # of the query in `trace`
    trace: "Trace"


def traced_scores(
    opened: "Opened", method: "TracedMethod", request: "ScoreRequest"
) -> Iterator[TracedPair]:
    """Query by query: first of whole steps, then of each requested training example."""
    assert method.trace is not None
    for ids, traced in method.trace(opened.gradients, request):
        for position in range(1 if request.sum_queries else len(ids)):
            query = None if request.sum_queries else int(ids[position])
            for example in (None, *request.train):
                number = None if example is None else int(example)
                yield TracedPair(query, number, position, traced)


def write_trace(
    opened: "Opened",
    pairs: Iterator[TracedPair],
    sink: "TableWriter",
    terminal: IO[str] | None,
) -> None:
    """Plots in a terminal, else rows."""
    from influence_cli.output.columns import TRACE_COLUMNS
    from influence_cli.output.tables import to_stdout

    if terminal is None:
        sink.write(trace_rows(opened, pairs), TRACE_COLUMNS)
        return
    from influence_cli.output.trace_plot import print_trace

    with to_stdout(terminal):
        for pair in pairs:
            query = "all queries" if pair.query is None else named(opened, "query", pair.query)
            example = "every step" if pair.example is None else named(opened, "train", pair.example)
            series = pair.trace.series(pair.position, pair.example)
            title = f"{query}, {example}: {sum(score for _, score in series):.4g}"
            first = pair.trace.first
            print_trace(title, series, range(first, first + len(pair.trace.sums)), terminal)


def named(opened: "Opened", split: str, index: int) -> str:
    """`query 57 (8)`: an example with its label."""
    label = opened.describe(split, index)[0]
    return f"{split} {index} ({label})" if label else f"{split} {index}"


def trace_rows(opened: "Opened", pairs: Iterator[TracedPair]) -> Iterator[Sequence[object]]:
    """One row per pair and step, with the running sum."""
    for pair in pairs:
        labels = [
            opened.describe(split, index)[0] if index is not None else ""
            for split, index in (("query", pair.query), ("train", pair.example))
        ]
        ids = ["all" if index is None else index for index in (pair.query, pair.example)]
        running = 0.0
        for step, score in pair.trace.series(pair.position, pair.example):
            running += score
            yield (*ids, step, score, running, *labels)
