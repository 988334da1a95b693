"""influence export: vectors whose inner products are scores."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from influence_cli.cli import command, options
from influence_cli.cli.method_options import flags_group, given_flags
from influence_cli.cli.row_options import Candidates, QueryRows, given_elsewhere
from influence_cli.cli.torch_import import import_torch
from influence_cli.methods.declaration import option_texts
from influence_cli.methods.table import METHODS, describe_methods

if TYPE_CHECKING:
    from influence_cli.api.opening import Opened
    from influence_cli.methods.declaration import Method as DeclaredMethod
    from influence_cli.methods.gradient_vectors import GradientVectors
    from influence_cli.output.vector_files import VectorTable

VECTOR_METHODS = {name: method for name, method in METHODS.items() if method.open_vectors}
VectorFlags = flags_group(
    "Options",
    {name: method.options for name, method in METHODS.items()},
    only=[name for method in VECTOR_METHODS.values() for name in option_texts(method.options)],
)
Method = Annotated[
    str,
    options.option(
        "--method", metavar="NAME", panel=options.RANKED, help=describe_methods(VECTOR_METHODS)
    ),
]
To = Annotated[
    str,
    options.option(
        "--to",
        metavar="npy|parquet",
        panel=options.OUT,
        help="npy: train.npy, queries.npy, train_ids.npy and query_ids.npy. parquet: train.parquet "
        "and queries.parquet with id, label, text and vector.",
    ),
]
Folder = Annotated[
    Path | None,
    options.option(
        "-o",
        "--output",
        metavar="DIR",
        panel=options.OUT,
        help="New folder to write to. DIR appears only when it is complete.",
    ),
]


@dataclasses.dataclass(frozen=True)
class VectorScores:
    """The flags that say how scores are made."""

    sum_queries: options.SumQueries = False
    lr: options.Lr = None
    lr_weights: options.LrWeights = None
    normalize: options.Normalize = False


@command("export", example="influence export my_run --project 512 -o vectors")
def export(
    shared: options.Shared,
    scored: VectorScores,
    rows: QueryRows,
    method_flags: VectorFlags,  # type: ignore[valid-type]  # a class that is made from METHODS
    method: Method = options.DEFAULT_METHOD,
    queries: options.Queries = None,
    train: options.Train = None,
    candidates: Candidates = None,
    trajectory: options.Trajectory = None,
    verify: options.Verify = False,
    to: To = "npy",
    output: Folder = None,
) -> None:
    """Write vectors of training examples and queries whose inner products are the scores.

    train @ queries.T is score --top all with the same flags. The query vectors contain the
    learning-rate weights. Without --project a vector has all numbers of all gradients.
    """
    from influence_cli.api import specs
    from influence_cli.api.given_rows import open_given_rows
    from influence_cli.api.score import ScoreArguments, check_method_arguments

    chosen = choose_method(method)
    scores = ScoreArguments(**vars(scored))
    given_others = given_elsewhere(shared, candidates)
    own_options = check_method_arguments(chosen, given_flags(method_flags), scores, given_others)
    specs.check_stdin(queries, train)
    folder = checked_folder(output, to)

    import_torch()
    from influence_cli.api.requests import score_request
    from influence_cli.cli.opening import open_shared

    given = open_given_rows(rows.query or None, rows.query_file, queries, candidates)
    opened = open_shared(shared, trajectory, verify=verify, given=given)
    ids = opened.ids("--train", train, "train"), opened.query_ids(queries)
    request = score_request(opened, chosen, own_options, *ids, scores)
    flags = {"command": "export", "method": chosen.name, "options": own_options}
    write_tables(opened, chosen, request, folder, to, {**flags, **vars(scored)})
    opened.note_unverified("--verify compares all")


def choose_method(name: str) -> "DeclaredMethod":
    """Raises UsageProblem for a method whose scores are no inner products."""
    from influence_cli.api import specs
    from influence_cli.errors import UsageProblem

    if name in METHODS and name not in VECTOR_METHODS:
        raise UsageProblem(
            f"export does not apply to --method {name}: its scores are no inner products of one "
            "vector per example",
            f"methods that have such vectors: {', '.join(VECTOR_METHODS)}",
        )
    return VECTOR_METHODS[specs.one_of("--method", name, VECTOR_METHODS)]


def checked_folder(output: Path | None, format: str) -> Path:
    """Raises UsageProblem where -o is missing or names no new folder, and for an unknown format."""
    from influence_cli.api import specs
    from influence_cli.errors import UsageProblem
    from influence_cli.output.formats import require_pyarrow
    from influence_cli.output.vector_files import FORMATS, check_folder_name

    if specs.one_of("--to", format, FORMATS) == "parquet":
        require_pyarrow("--to parquet")
    if output is None:
        raise UsageProblem("export writes a folder, and -o is missing", "name it: -o DIR")
    check_folder_name(output)
    return output


def write_tables(
    opened: "Opened",
    method: "DeclaredMethod",
    request: Any,  # a ScoreRequest
    output: Path,
    format: str,
    flags: dict[str, object],
) -> None:
    """Compute the vectors and write the folder."""
    from influence_cli.api.table_request import record_maker
    from influence_cli.methods.gradient_vectors import GradientVectors
    from influence_cli.output.table_record import describe_command
    from influence_cli.output.vector_files import check_room, describe_sizes, write_vectors

    assert method.open_vectors is not None
    vectors = GradientVectors(opened.gradients, request)
    tables = vector_tables(opened, vectors)
    opened.reporter.note(describe_sizes(tables))
    check_room(output, tables, format)
    vectors.open(method.open_vectors)
    made = record_maker(opened, flags, request.train, request.queries, None, None)

    def record() -> dict[str, Any]:  # Any: JSON values
        layout = [dataclasses.asdict(stretch) for stretch in vectors.layout]
        return {**describe_command(), **made(), "layout": layout}

    write_vectors(output, tables, format, record)


def vector_tables(opened: "Opened", vectors: "GradientVectors") -> "list[VectorTable]":
    """Queries first: their files are small."""
    import numpy as np

    from influence_cli.output.vector_files import VectorTable

    request, width, has_ids = vectors.request, vectors.width, opened.has_ids

    def describe(split: str, id: Any) -> tuple[str, str, str]:  # Any: an int, or "all"
        return ("", "", "") if id == "all" else opened.describe(split, id)

    query_ids = np.array(["all"]) if request.sum_queries else np.asarray(request.queries, np.int64)
    train_ids = np.asarray(request.train, np.int64)
    return [
        VectorTable(
            "queries", "query_ids", query_ids, width, vectors.query_blocks(),
            lambda id: describe("query", id), has_ids,
        ),
        VectorTable(
            "train", "train_ids", train_ids, width, vectors.train_blocks(),
            lambda id: describe("train", id), has_ids,
        ),
    ]  # fmt: skip
