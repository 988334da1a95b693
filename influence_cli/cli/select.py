"""influence select: ids of training examples, by their scores in a table."""

from typing import TYPE_CHECKING, Annotated

from typer import Argument

from influence_cli.cli import command, options

if TYPE_CHECKING:
    from influence_cli.output.selection import ExampleScores, SelectionRule

CHOICE = "Which examples"
Scores = Annotated[
    str,
    Argument(
        metavar="SCORES",
        help=(
            "Table that score or self wrote: csv, tsv, jsonl or parquet by its file name; "
            "- reads csv from stdin."
        ),
    ),
]
Keep = Annotated[
    bool,
    options.option(
        "--keep", panel=CHOICE, help="Write the ids of the examples that the rule names."
    ),
]
Drop = Annotated[
    bool,
    options.option(
        "--drop", panel=CHOICE, help="Write the ids of all other examples in the table."
    ),
]
Top = Annotated[
    str | None,
    options.option(
        "--top",
        panel=CHOICE,
        metavar="N|P%",
        help="Rule: the N highest scores, or P percent of the examples in the table, rounded to "
        "the nearest number. Of equal scores, lower ids come first.",
    ),
]
Above = Annotated[
    float | None,
    options.option("--above", panel=CHOICE, metavar="X", help="Rule: scores above X."),
]
Below = Annotated[
    float | None,
    options.option("--below", panel=CHOICE, metavar="X", help="Rule: scores below X."),
]
PerClass = Annotated[
    bool,
    options.option(
        "--per-class", panel=CHOICE, help="Apply --top within each label (column train_label)."
    ),
]


@command("select", example="influence select suspects.csv --drop --top 5% -o clean.txt")
def select(
    scores: Scores,
    keep: Keep = False,
    drop: Drop = False,
    top: Top = None,
    above: Above = None,
    below: Below = None,
    per_class: PerClass = False,
    output: options.Output = None,
    quiet: options.Quiet = False,
) -> None:
    """Select training examples by their scores in a table, and write their ids, one a line.

    An example's score is the sum of its rows: over all queries of the table, and over the parts of
    --by. Ids are those of the column train, lowest first; with --group-by they are names of groups.
    """
    import sys

    from influence_cli.errors import UsageProblem
    from influence_cli.output.score_tables import read_score_rows
    from influence_cli.output.selection import matching_examples, sum_scores
    from influence_cli.output.stderr_reporter import StderrReporter
    from influence_cli.output.table_record import read_record
    from influence_cli.output.tables import check_file_name, write_lines
    from influence_cli.progress import Reporter

    if keep == drop:
        problem = "--keep and --drop exclude each other" if keep else "neither --keep nor --drop"
        raise UsageProblem(problem, "expected: one of --keep and --drop")
    rule = parse_rule(top, above, below, per_class)
    if output is not None:
        check_file_name(output)
    record = read_record(scores) or {}
    table = sum_scores(scores, read_score_rows(scores, sys.stdin))
    if per_class and table.labels is None:
        raise UsageProblem(
            f"--per-class: {scores} has no labels",
            "expected: a column train_label, which label(example) in definition.py fills",
        )
    matches = matching_examples(table, rule, per_class)
    ids = [train for at, train in enumerate(table.ids) if (at in matches) == keep]
    reporter = Reporter() if quiet else StderrReporter()
    source = "stdin" if scores == "-" else scores
    for note in describe_selection(source, table, rule, per_class, record.get("top"), len(ids)):
        reporter.note(note)
    write_lines(ids, output)


def parse_rule(
    top: str | None, above: float | None, below: float | None, per_class: bool
) -> "SelectionRule":
    """Raises UsageProblem unless exactly one of the three is given, with a value it can have."""
    import math

    from influence_cli.api import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output.selection import SelectionRule

    values = {"--top": top, "--above": above, "--below": below}
    given = [flag for flag, value in values.items() if value is not None]
    if len(given) != 1:
        raise UsageProblem(
            f"{' and '.join(given)} exclude each other" if given else "no rule that names examples",
            "expected: one of --top, --above and --below",
        )
    if per_class and top is None:
        raise UsageProblem(
            f"--per-class does not apply to {given[0]}: its number is the same in each class",
            "leave out --per-class, or choose by --top",
        )
    for flag, number in (("--above", above), ("--below", below)):
        if number is not None and not math.isfinite(number):
            raise UsageProblem(f"{flag} {number}", "expected: a number")
    if top is not None:
        return SelectionRule(top=specs.number_or_share("--top", top))
    return SelectionRule(above=above) if above is not None else SelectionRule(below=below or 0.0)


def describe_selection(
    source: str,
    table: "ExampleScores",
    rule: "SelectionRule",
    per_class: bool,
    listed: int | None,
    count: int,
) -> list[str]:
    """What the table lacks, and how many ids there are. `listed`: the --top of the table."""
    from influence_cli.errors import counted
    from influence_cli.output.selection import smaller_than_top

    notes = []
    if listed is not None:
        notes.append(
            f"{source} was written with --top {listed}: the ids are of the examples that it lists. "
            "Write it with --top all to select among all examples"
        )
    if table.missing:
        notes.append(
            f"{source} lacks {counted(table.missing, 'pair')} of its queries and examples, which "
            "count as 0. `influence score --top all` writes all pairs"
        )
    if small := smaller_than_top(table, rule, per_class):
        noun = counted(small, "class has", "classes have") if per_class else f"{source} has"
        notes.append(f"{noun} fewer than {rule.top:,} examples, and --top {rule.top} names all")
    return [*notes, f"{count:,} of the {len(table.ids):,} examples in {source}"]
