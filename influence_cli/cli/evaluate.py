"""influence evaluate: how well do scores predict what retraining does, on this run?"""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument

from influence_cli.cli import command, options
from influence_cli.cli.method_options import flags_group, given_flags
from influence_cli.cli.torch_import import import_torch
from influence_cli.evaluate.table import PROTOCOLS
from influence_cli.methods.table import METHODS

if TYPE_CHECKING:
    from influence_cli.api.opening import Opened
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.evaluate.declaration import Figure, ScoreTable
    from influence_cli.evaluate.declaration import Protocol as EvaluationProtocol
    from influence_cli.methods.request import ScoreRequest

Protocol = Annotated[
    str,
    Argument(
        metavar="PROTOCOL",
        help="; ".join(f"{name}: {protocol.help}" for name, protocol in PROTOCOLS.items()) + ".",
    ),
]
Files = Annotated[
    list[Path] | None,
    Argument(
        metavar="[FILE]...",
        help="Score files of any tool: "
        + ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.evaluates_files)
        + " evaluate each one, "
        + ", ".join(name for name, protocol in PROTOCOLS.items() if protocol.compare_tables)
        + " compares two.",
    ),
]
Methods = Annotated[
    list[str] | None,
    options.option(
        "--method",
        metavar="NAME",
        panel=options.RANKED,
        help=f"Method to evaluate: {', '.join(METHODS)}. Repeatable.",
    ),
]
By = Annotated[
    str | None,
    options.option(
        "--by",
        metavar="PART",
        panel=options.RANKED,
        help="Rows for each part of a figure, too: "
        + ", ".join(dict.fromkeys(part for known in PROTOCOLS.values() for part in known.parts))
        + ".",
    ),
]
ProtocolFlags = flags_group(
    f"Options of {', '.join(PROTOCOLS)}",
    {name: protocol.options for name, protocol in PROTOCOLS.items()}
    | {name: method.options for name, method in METHODS.items()},
    only=dict.fromkeys(name for protocol in PROTOCOLS.values() for name in protocol.flags),
)


@command("evaluate", example=next(iter(PROTOCOLS.values())).example, ranks=True)
def evaluate(
    shared: options.Shared,
    protocol_flags: ProtocolFlags,  # type: ignore[valid-type]  # made from PROTOCOLS
    protocol: Protocol,
    files: Files = None,
    method: Methods = None,
    queries: options.Queries = None,
    by: By = None,
    lr: options.Lr = None,
    lr_weights: options.LrWeights = None,
    trajectory: options.Trajectory = None,
    format: options.Format = None,
    output: options.Output = None,
) -> None:
    """How well do scores predict what retraining does, on this run? It really retrains.

    The table has one row per figure, with its 95 % interval and its cost. Finished retrainings are
    stored. If it is interrupted, run the same command to resume. Several processes of the same
    command, or of torchrun, divide the retrainings.
    """
    from influence_cli.api import specs
    from influence_cli.evaluate.declaration import table_columns, table_rows
    from influence_cli.output.tables import TableWriter

    chosen = PROTOCOLS[specs.one_of("PROTOCOL", protocol, PROTOCOLS)]
    chosen.check_part(by)
    chosen.check_queries(queries)
    chosen.check_files(files or [])
    rank = check_ranks(shared.cache)
    flags = RequestFlags(shared, queries, (lr, lr_weights), trajectory, by)
    names = method or ([] if files else chosen.default_methods)
    own_options, options_of = read_options(chosen, names, protocol_flags, flags)
    sink = TableWriter.open(format, output)
    if files and chosen.compare_tables is not None:
        figures = compare_tables(chosen, files, own_options, options_of, flags)
    else:
        figures = evaluate_methods(chosen, own_options, options_of, flags, files or [])
    rows = table_rows(chosen.name, figures, by)
    if rank == 0:
        sink.write(rows, table_columns(by))
    else:
        collections.deque(rows, maxlen=0)  # its trainings are in the cache, for rank 0


def check_ranks(cache: str | None) -> int:
    """The number of this rank. Raises UsageProblem where ranks have no cache to share."""
    from influence_cli.errors import UsageProblem
    from influence_cli.parallel.ranks import place_of

    place = place_of(os.environ)
    if place.count > 1 and cache == "none":
        raise UsageProblem(
            f"--cache none stores no retrainings, so {place.count} ranks can't divide them",
            "leave out --cache none, or start one process without torchrun",
        )
    return place.rank


@dataclass(frozen=True)
class RequestFlags:
    """The flags from which each method's request is made."""

    shared: options.Shared
    queries: str | None
    rates: tuple[float | None, str | None]
    trajectory: Path | None
    by: str | None


def read_options(
    protocol: "EvaluationProtocol", names: Sequence[str], own_flags: object, flags: RequestFlags
) -> tuple[object, dict[str, object]]:
    """The protocol's options, and those of each method to evaluate."""
    from influence_cli.api import specs
    from influence_cli.api.method_options import build_options, options_of_methods, refuse_flags
    from influence_cli.methods.declaration import option_texts

    methods = [METHODS[specs.one_of("--method", name, METHODS)] for name in names]
    given = given_flags(own_flags)
    own_names = option_texts(protocol.options)
    own_options = build_options(
        protocol.options, {name: value for name, value in given.items() if name in own_names}
    )
    specs.check_seed(flags.shared.seed)
    specs.check_rates(methods, *flags.rates)
    options_of = options_of_methods(methods, given, protocol.options)
    shared = flags.shared
    for method in methods:
        protocol.check_method(method.name)
        refuse_flags(
            method, {"--project": shared.project is not None, "--layers": bool(shared.layers)}
        )
    for name in protocol.beside:
        options_of.setdefault(name, METHODS[name].options())
    return own_options, options_of


def compare_tables(
    protocol: "EvaluationProtocol",
    files: Sequence[Path],
    own_options: object,
    options_of: dict[str, object],
    flags: RequestFlags,
) -> "Iterator[Figure]":
    """The protocol's figures of score files and run folders. A single one is compared with RUN."""
    import_torch()
    from influence_cli.evaluate.declaration import ScoreTable
    from influence_cli.output.score_tables import read_score_file
    from influence_cli.output.stderr_reporter import StderrReporter
    from influence_cli.progress import Reporter

    sources = [flags.shared.run, *files] if len(files) == 1 else list(files)
    folders = [source for source in sources if source.is_dir()]
    check_run_flags(folders, options_of, flags)
    tables = {
        source: ScoreTable(str(source), partial(read_score_file, source)) for source in sources
    }
    of_runs = open_tables(folders, options_of, flags)
    reporter = Reporter() if flags.shared.quiet else StderrReporter()
    assert protocol.compare_tables is not None
    chosen = [table for source in sources for table in of_runs.get(source, [tables[source]])]
    return protocol.compare_tables(chosen, own_options, flags.shared.seed or 0, reporter)


def check_run_flags(
    folders: Sequence[Path], options_of: dict[str, object], flags: RequestFlags
) -> None:
    """Raises UsageProblem for flags that the compared tables have no use for, or lack."""
    from influence_cli.errors import UsageProblem

    if folders and not options_of:
        raise UsageProblem(
            f"{folders[0]} is a run, so its scores need a method",
            "expected: --method NAME, such as --method influence",
        )
    given = {
        "--method": options_of or None,
        "--queries": flags.queries,
        "--steps": flags.shared.steps,
    }
    for flag in (flag for flag, value in given.items() if value is not None and not folders):
        raise UsageProblem(
            f"{flag} does not apply to score files, which have their scores already",
            f"leave out {flag}, or the files",
        )


def open_tables(
    folders: Sequence[Path], options_of: dict[str, object], flags: RequestFlags
) -> "dict[Path, list[ScoreTable]]":
    """The tables of each run folder, one a method. Each definition imports its own modules, also
    where another run has modules of the same name. Raises UsageProblem for runs on other data.
    """
    from influence_cli.evaluate.score_agreement import check_same_examples, tables_of_run
    from influence_cli.run.import_scope import ImportScope

    tables, first = {}, None
    for folder in folders:
        shared = dataclasses.replace(flags.shared, run=folder)
        scope = ImportScope(shared.definition or folder / "definition.py")
        with scope.entered():
            opened, _, requests = open_requests(
                options_of, dataclasses.replace(flags, shared=shared)
            )
            first = first or opened.run
            check_same_examples(first, opened.run)
        of_run = tables_of_run(opened.gradients, requests, str(folder))
        tables[folder] = [table.read_inside(scope.entered) for table in of_run]
    return tables


def open_requests(
    options_of: dict[str, object], flags: RequestFlags
) -> "tuple[Opened, Ids, dict[str, ScoreRequest]]":
    """The run of the flags, the queries, and the request of each method."""
    from influence_cli.api.requests import score_request
    from influence_cli.api.score import ScoreArguments
    from influence_cli.cli.opening import open_shared

    opened = open_shared(flags.shared, flags.trajectory, connected=False)
    ids = opened.ids("--queries", flags.queries, "query")
    lr, lr_weights = flags.rates
    scores = ScoreArguments(lr=lr, lr_weights=lr_weights)

    def request(name: str, own: object) -> "ScoreRequest":
        method = METHODS[name]
        return score_request(opened, method, own, range(0), ids, scores, last_checkpoint=True)

    return opened, ids, {name: request(name, own) for name, own in options_of.items()}


def evaluate_methods(
    protocol: "EvaluationProtocol",
    own_options: object,
    options_of: dict[str, object],
    flags: RequestFlags,
    files: Sequence[Path],
) -> "Iterator[Figure]":
    """The protocol's figures. `own_options`: the protocol's, `options_of`: those of each method."""
    import_torch()
    from influence_cli.evaluate.declaration import EvaluationRequest

    opened, ids, requests = open_requests(options_of, flags)
    work = EvaluationRequest(
        requests, opened.checkpoints, ids, own_options, opened.seed, opened.folder, flags.by, files
    )
    yield from protocol.evaluate(opened.gradients, work)
    opened.note_unverified()
