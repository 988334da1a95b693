"""influence methods: what each method answers, needs and costs."""

from influence_cli.cli import command, options


@command("methods", example="influence methods")
def methods(format: options.Format = None, output: options.Output = None) -> None:
    """List the methods: the question that each one answers, its needs, its cost and its source."""
    from influence_cli.methods.table import METHODS
    from influence_cli.output.columns import METHOD_COLUMNS
    from influence_cli.output.tables import TableWriter

    rows = [
        (name, method.question, method.needs, method.cost, method.source)
        for name, method in METHODS.items()
    ]
    sink = TableWriter.open(format, output)
    sink.write(rows, METHOD_COLUMNS)
