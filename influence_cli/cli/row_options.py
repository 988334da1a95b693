"""The flags that name rows from the command line, instead of a dataset of the definition."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from influence_cli.cli.options import RANKED, Shared, option

Query = Annotated[
    list[str] | None,
    option(
        "--query",
        metavar="TEXT|JSON",
        panel=RANKED,
        help="Query instead of query_data(): a text, or a JSON object of column: value, from "
        "which example(row) makes an example. Repeatable.",
    ),
]
QueryFile = Annotated[
    Path | None,
    option(
        "--query-file",
        metavar="FILE",
        panel=RANKED,
        help="Queries instead of query_data(): rows of csv, tsv, jsonl or parquet, from which "
        "example(row) makes examples. --queries selects among them.",
    ),
]
Candidates = Annotated[
    Path | None,
    option(
        "--candidates",
        metavar="FILE",
        panel=RANKED,
        help="Rows to rank instead of train_data(): csv, tsv, jsonl or parquet, from which "
        "example(row) makes examples. --train selects among them.",
    ),
]


@dataclass(frozen=True)
class QueryRows:
    """The flags that give queries."""

    query: Query = None
    query_file: QueryFile = None


def given_elsewhere(shared: Shared, candidates: Path | None) -> dict[str, bool]:
    """Which flags that some methods do not have are given, besides those of the scores."""
    return {
        "--layers": bool(shared.layers),
        "--project": shared.project is not None,
        "--candidates": candidates is not None,
    }
