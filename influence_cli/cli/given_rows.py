"""From --query, --query-file and --candidates to rows. A problem names the flag."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from influence_cli.cli.row_options import QueryRows
from influence_cli.errors import UsageProblem, shown
from influence_cli.run.definition import Definition
from influence_cli.run.given_rows import GivenRows
from influence_cli.storage.json_text import parse_json

Given = dict[str, GivenRows]  # split -> the rows that replace it
CHUNK = 1 << 20


def check_query_flags(flags: QueryRows, queries: str | None) -> None:
    """Raises UsageProblem for flags that contradict each other."""
    if flags.query and flags.query_file is not None:
        raise UsageProblem("--query and --query-file both give queries", "give one of them")
    if flags.query and queries is not None:
        raise UsageProblem(
            "--queries selects among queries, and --query gives them itself", "leave out --queries"
        )


def open_given_rows(
    flags: QueryRows, queries: str | None = None, candidates: Path | None = None
) -> Given:
    """The rows that the flags give. `queries`: --queries.

    Raises UsageProblem: flags that contradict each other, no such file, no JSON object; DataError:
    a table that can't be read.
    """
    check_query_flags(flags, queries)
    given: Given = {}
    if flags.query:
        rows = [parse_query(text) for text in flags.query]
        digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        given["query"] = GivenRows(rows, "--query", digest)
    if flags.query_file is not None:
        given["query"] = open_rows("--query-file", flags.query_file)
    if candidates is not None:
        given["train"] = open_rows("--candidates", candidates)
    return given


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


def open_rows(flag: str, path: Path) -> GivenRows:
    from influence_cli.integrations.tables import table

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
