"""Tables of pairs and of self-influence in memory: only what a page shows of them."""

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from influence_cli.errors import TableError
from influence_cli.output.columns import PARTS
from influence_cli.output.score_tables import (
    WRITE_AGAIN,
    ScoreRow,
    find_places,
    parse_finite,
    parse_row,
)
from influence_cli.output.table_record import Record
from influence_cli.report.example_list import (
    GROUP,
    QUERY,
    TRAIN,
    ExampleKey,
    ExampleList,
    ExampleTexts,
)

PROPONENT, OPPONENT = "proponent", "opponent"


@dataclass(slots=True)
class PairScore:
    """The score of a pair, and its parts where the table has parts."""

    kind: str
    score: float
    parts: list[tuple[str, float]]


class TextColumns:
    """Reads label, text and own id of one side of a row: `query` or `train`."""

    def __init__(self, columns: list[str], side: str) -> None:
        names = (f"{side}_label", f"{side}_text", f"{side}_id")
        self._at = [columns.index(name) if name in columns else None for name in names]

    def read(self, cells: Sequence[object]) -> ExampleTexts:
        return ExampleTexts(
            *(
                None if at is None else "" if cells[at] is None else str(cells[at])
                for at in self._at
            )
        )


class PairTable:
    """A table of `score` or `trace`. `queries`: number of a query -> number of a training example
    -> score. `scores`: of all pairs, also of those below `top`.
    """

    def __init__(
        self,
        name: str,
        columns: list[str],
        record: Record | None,
        examples: ExampleList,
        top: int | None,
    ) -> None:
        self.name, self.columns, self.record, self.written = name, columns, record, ""
        self.part = next((part for part in PARTS if part in columns), None)
        self.queries: dict[int, dict[int, PairScore]] = {}
        self._rest = array("d")  # scores of pairs below `top`
        self._rest_pair: tuple[str, str] | None = None  # the last of them
        self._examples, self._top = examples, top
        self._places = find_places(name, columns)
        self._texts = {side: TextColumns(columns, side) for side in (QUERY, TRAIN)}
        place = {column: at for at, column in enumerate(columns)}
        self._kind, self._rank = place.get("kind"), place.get("rank")
        self._part = place[self.part] if self.part else None
        request = (record or {}).get("request") or {}
        self._space = GROUP if request.get("group_by") is not None else TRAIN

    @property
    def scores(self) -> list[float]:
        shown = (pair.score for pairs in self.queries.values() for pair in pairs.values())
        return [*self._rest, *shown]

    def add(self, line: int, cells: Sequence[object]) -> None:
        """Raises TableError for a broken row, and for an example that another row contradicts."""
        row = parse_row(self.name, self._places, line, cells)
        rank = None if self._rank is None else parse_finite(cells[self._rank])
        if self._top is not None and rank is not None and rank > self._top:
            self._add_rest(row)
            return
        key = ExampleKey(QUERY, row.query)
        query = self._examples.add(key, self._texts[QUERY].read(cells), self.name)
        key = ExampleKey(self._space, row.train)
        train = self._examples.add(key, self._texts[TRAIN].read(cells), self.name)
        pairs = self.queries.setdefault(query, {})
        pair = pairs.get(train)
        if pair is None:
            kind = str(cells[self._kind]) if self._kind is not None else ""
            pair = pairs[train] = PairScore(kind, 0.0, [])
        elif self._part is None:
            problem = f"the pair of query {row.query} and training example {row.train} stands twice"
            raise TableError(f"{self.name}, line {line}: {problem}", WRITE_AGAIN)
        pair.score += row.score
        if not math.isfinite(pair.score):
            problem = f"the parts of query {row.query} and training example {row.train} sum to inf"
            raise TableError(f"{self.name}, line {line}: {problem}", WRITE_AGAIN)
        if self._part is not None:
            pair.parts.append((str(cells[self._part]), row.score))

    def _add_rest(self, row: ScoreRow) -> None:
        """The parts of a pair are rows in sequence."""
        if self._part is not None and self._rest_pair == (row.query, row.train):
            self._rest[-1] += row.score
        else:
            self._rest.append(row.score)
        self._rest_pair = (row.query, row.train)

    def rank_pairs(self, query: int) -> list[tuple[int, str, int, float]]:
        """(example, kind, rank, score) of a query: proponents, then opponents, strongest first."""
        ranked = []
        kinds: dict[str, list[tuple[float, int]]] = {PROPONENT: [], OPPONENT: []}
        for train, pair in self.queries[query].items():
            kind = pair.kind or (PROPONENT if pair.score >= 0 else OPPONENT)
            kinds.setdefault(kind, []).append((pair.score, train))
        for kind, pairs in kinds.items():
            sign = -1 if kind == PROPONENT else 1
            pairs.sort(key=lambda entry: sign * entry[0])
            ranked += [
                (train, kind, rank, score)
                for rank, (score, train) in enumerate(pairs[: self._top], start=1)
            ]
        return ranked


@dataclass
class SelfTable:
    """A table of `self`. `entries`: (number of an example, score, loss or None)."""

    name: str
    columns: list[str]
    record: Record | None
    examples: ExampleList
    written: str = ""
    entries: list[tuple[int, float, float | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._places = find_places(self.name, self.columns)
        self._texts = TextColumns(self.columns, TRAIN)
        self._loss = self.columns.index("loss") if "loss" in self.columns else None

    def add(self, line: int, cells: Sequence[object]) -> None:
        """Raises TableError for a broken row, and for an example that another row contradicts."""
        row = parse_row(self.name, self._places, line, cells)
        key = ExampleKey(TRAIN, row.train)
        number = self.examples.add(key, self._texts.read(cells), self.name)
        loss = None if self._loss is None else parse_finite(cells[self._loss])
        self.entries.append((number, row.score, loss))

    @property
    def scores(self) -> list[float]:
        return [score for _, score, _ in self.entries]
