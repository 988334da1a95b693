"""Rows that replace a dataset: of --query, --query-file and --candidates, or Python's."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from influence_cli.errors import UsageProblem, shown
from influence_cli.run.definition import Definition
from influence_cli.run.given_rows import GivenRows
from influence_cli.storage.json_text import parse_json

Given = dict[str, GivenRows]  # split -> the rows that replace it
TableRow = Mapping[str, Any]  # column -> value
CHUNK = 1 << 20


def open_given_rows(
    query: str | TableRow | Sequence[str | TableRow] | None = None,
    query_file: str | Path | Sequence[TableRow] | None = None,
    queries: object = None,
    candidates: str | Path | Sequence[TableRow] | None = None,
) -> Given:
    """The rows of --query, --query-file and --candidates. `queries`: --queries.

    Raises UsageProblem: arguments that contradict each other, no such file, no rows; DataError: a
    table that can't be read.
    """
    if query is not None and query_file is not None:
        raise UsageProblem("--query and --query-file both give queries", "give one of them")
    if query is not None and queries is not None:
        raise UsageProblem(
            "--queries selects among queries, and --query gives them itself", "leave out --queries"
        )
    given: Given = {}
    if query is not None:
        parts = [query] if isinstance(query, str | Mapping) else query
        given["query"] = list_rows("--query", parts, parse_query)
    if query_file is not None:
        given["query"] = open_rows("--query-file", query_file)
    if candidates is not None:
        given["train"] = open_rows("--candidates", candidates)
    return given


def list_rows(
    flag: str,
    parts: Sequence[str | TableRow],
    parse: Callable[[str], TableRow] | None = None,
) -> GivenRows:
    """Rows of Python, whose digest is that of their JSON. `parse`: makes a row of a text."""
    if not isinstance(parts, Sequence):
        raise UsageProblem(
            f"{flag}: found {shown(type(parts).__name__)}",
            "expected: a list of rows, each a dict of column -> value",
            "of a data frame: frame.to_dict('records')",
        )
    rows = []
    for number, part in enumerate(parts):
        row = parse(part) if parse is not None and isinstance(part, str) else part
        if not isinstance(row, Mapping):
            raise UsageProblem(
                f"{flag}: row {number} is {shown(row)}",
                "expected: a dict of column -> value for each row, or the path of a file",
            )
        rows.append(dict(row))
    try:
        content = json.dumps(rows).encode()
    except (TypeError, ValueError) as error:
        raise UsageProblem(
            f"{flag}: rows must be JSON, and {error}",
            "expected: texts, numbers, None, lists and dicts; of an array: array.tolist()",
        ) from error
    return GivenRows(rows, flag, hashlib.sha256(content).hexdigest())


def parse_query(text: str) -> dict[str, object]:
    """A JSON object is the row; other text is its column `text`."""
    if not text.lstrip().startswith("{"):
        return {"text": text}
    try:
        row = parse_json(text.encode(errors="surrogateescape"), finite=False)
    except ValueError as error:
        raise UsageProblem(
            f"--query {shown(text)} is no JSON object: {error}",
            'expected: a text, or an object like {"text": "good", "label": 1}',
            'a text that begins with { can be given as {"text": "{..."}',
        ) from error
    return row


def open_rows(flag: str, source: str | Path | Sequence[TableRow]) -> GivenRows:
    """The rows of a file, or of a list."""
    from influence_cli.integrations.tables import table

    if not isinstance(source, str | Path):
        return list_rows(flag, source)
    path = Path(source)
    if not path.exists():
        raise UsageProblem(
            f"{flag} {path}: no such file", "expected: a csv, tsv, jsonl or parquet file"
        )
    return GivenRows(table(path), f"{flag} {path}", digest_content(path))


def digest_content(path: Path) -> str:
    """sha256 of a file's bytes, or of all files of a folder with their names; in flat memory."""
    digest = hashlib.sha256()
    for file in list_files(path):
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while chunk := content.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def list_files(path: Path) -> Iterator[Path]:
    """The file, or the files of a folder without the caches of datasets."""
    if not path.is_dir():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("cache-"):
            yield file


def check_definition(given: Given, definition: Definition) -> None:
    """Raises UsageProblem where the definition can't make examples of rows."""
    for rows in given.values():
        if not definition.has("example"):
            raise UsageProblem(
                f"{rows.source} needs example(row) in {definition.path.name}, which makes an "
                "example of a row",
                "add for example: def example(row): return encode(row['text']), int(row['label'])",
                "row: a dict of column -> value; expected: what train_data()[i] returns",
            )
