"""The data of a page: tables of the same scores become one view with several parts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from influence_cli.errors import TableError
from influence_cli.output.table_record import Record
from influence_cli.output.visible import escape_character
from influence_cli.report.collected_tables import PROPONENT, PairTable, SelfTable
from influence_cli.report.example_list import ExampleKey, ExampleList, ExampleTexts

LONGEST_TEXT = 4000  # characters of a text that the page has
DIGITS = 7  # of a number; the page shows four
# Invisible on a page, or able to reorder it. Joiners stay: scripts and emoji need them
ACTING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
Json = Any  # Any: JSON values


@dataclass
class View:
    """The scores of one request: `base` has the pairs, `parts` how their scores are made up."""

    base: PairTable
    parts: dict[str, PairTable] = field(default_factory=dict)

    @property
    def tables(self) -> list[PairTable]:
        return [self.base, *(table for table in self.parts.values() if table is not self.base)]


def join_views(tables: Sequence[PairTable]) -> list[View]:
    """One view for all tables whose records differ in --by alone; others stand alone.

    Raises TableError for two tables of the same scores.
    """
    by_request: dict[str, dict[str | None, PairTable]] = {}
    for number, table in enumerate(tables):
        request = dict((table.record or {}).get("request") or {})
        part = request.pop("by", table.part)
        key = json.dumps(request, sort_keys=True) if request else f"table {number}"
        same_request = by_request.setdefault(key, {})
        if part in same_request:
            raise TableError(
                f"{same_request[part].name} and {table.name} have the same scores",
                "name one of them",
            )
        same_request[part] = table
    views = []
    for same_request in by_request.values():
        base = same_request.get(None) or next(iter(same_request.values()))
        parts = {table.part: table for table in same_request.values() if table.part}
        views.append(View(base, parts))
    return views


def describe_view(view: View, name: str) -> Json:
    """`queries`: [query, [[example, is proponent, rank, score, parts], ...]], `pairs` cut."""
    queries = []
    for query in view.base.queries:
        rows = []
        for train, kind, rank, score in view.base.rank_pairs(query):
            row: list[Json] = [train, int(kind == PROPONENT), rank, round_score(score)]
            parts = {
                part: [(name, round_score(share)) for name, share in pair.parts]
                for part, table in view.parts.items()
                if (pair := table.queries.get(query, {}).get(train)) is not None
            }
            rows.append([*row, parts] if parts else row)
        queries.append([query, rows])
    return {"name": name, "queries": queries}


def describe_self(table: SelfTable, name: str) -> Json:
    """`rows`: [example, score, loss], as the table sorts them."""
    rows = [
        (number, round_score(score), None if loss is None else round_score(loss))
        for number, score, loss in table.entries
    ]
    return {"name": name, "rows": rows}


def round_score(score: float) -> float:
    return float(f"{score:.{DIGITS}g}")


def describe_examples(examples: ExampleList) -> Json:
    """[space, id, label, text, own id], by number."""
    return [describe_example(key, texts) for key, texts in examples]


def describe_example(key: ExampleKey, texts: ExampleTexts) -> list[str]:
    label, text, own_id = (escape_acting(part or "") for part in texts)
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}… ({len(text):,} characters)"
    row = [key.space, escape_acting(key.id), label, text, own_id]
    while row and not row[-1]:
        row.pop()
    return row


def escape_acting(text: str) -> str:
    """The text for a page: `\\x00` for a character that acts or that nobody sees."""
    text = text.replace("\r\n", "\n")
    return ACTING.sub(lambda match: escape_character(match[0]), text)


def describe_table(name: str, record: Record | None) -> str:
    """`tracin`, else the name of the file."""
    request = (record or {}).get("request") or {}
    return str(request.get("method") or name or "scores")


def list_names(tables: Sequence[PairTable | SelfTable]) -> list[str]:
    """A name for each table: its method; with the name of its file where two are equal."""
    names = [describe_table(table.name, table.record) for table in tables]
    return [
        f"{name} ({table.name})" if names.count(name) > 1 and name != table.name else name
        for name, table in zip(names, tables, strict=True)
    ]
