"""Selects training examples by their scores in a table.

The score of an example is its sum over the table's rows: over queries, and over the parts of --by.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from influence_cli.errors import TableError, shown
from influence_cli.output.score_tables import ScoreRow

IdKey = tuple[bool, int, str]  # numbers first, by value; then names


@dataclass(frozen=True)
class ExampleScores:
    """The examples of a table, in the order of their ids, with summed scores.

    `labels`: None where the table has none. `missing`: pairs of its queries and its examples that
    the table does not list.
    """

    ids: list[str]
    scores: list[float]
    labels: list[str] | None
    missing: int


@dataclass(frozen=True)
class SelectionRule:
    """Which scores: the highest `top`, a number or a share of the examples (a fraction up to 1,
    rounded to the nearest number of examples, halves up); or those above or below a number.
    """

    top: int | Fraction | None = None
    above: float = -math.inf
    below: float = math.inf

    def size_of(self, count: int) -> int:
        """How many of `count` examples `top` means; it may be more."""
        if isinstance(self.top, int):
            return self.top
        assert self.top is not None
        return math.floor(self.top * count + Fraction(1, 2))


def sum_scores(name: str, rows: Iterable[ScoreRow]) -> ExampleScores:
    """Adds the rows of each example. Memory: its id, its sum, and one byte per pair.

    Raises TableError for an example with two labels, an id with a line end, and a sum that is not
    finite.
    """
    numbers: dict[str, int] = {}  # of examples, in the order of the rows
    sums: list[float] = []
    labels: list[str | None] = []
    pairs: dict[str, bytearray] = {}  # query -> which examples it has scores of
    for row in rows:
        number = numbers.setdefault(row.train, len(numbers))
        if number == len(sums):
            if "\n" in row.train or "\r" in row.train:
                raise TableError(
                    f"{name}: the id {shown(row.train)} has a line end",
                    "expected: ids that fit on one line, because select writes one a line",
                )
            sums.append(0.0)
            labels.append(row.label)
        if labels[number] != row.label:
            raise TableError(
                f"{name}: training example {shown(row.train)} has two labels",
                f"found: {shown(labels[number])} and {shown(row.label)}",
                "write this table again",
            )
        sums[number] += row.score
        marks = pairs.setdefault(row.query, bytearray())
        marks.extend(bytes(max(0, number + 1 - len(marks))))
        marks[number] = 1
    order = sorted(numbers, key=id_key)
    for train in order:
        if not math.isfinite(sums[numbers[train]]):
            raise TableError(
                f"{name}: the sum of the scores of training example {shown(train)} is not finite",
                "select fewer queries, or choose a smaller --lr",
            )
    return ExampleScores(
        order,
        [sums[numbers[train]] for train in order],
        [labels[numbers[train]] or "" for train in order] if any(labels) else None,
        len(pairs) * len(numbers) - sum(map(sum, pairs.values())),
    )


def id_key(text: str) -> IdKey:
    is_number = text.isascii() and text.isdecimal()
    return not is_number, int(text) if is_number and len(text) < 19 else 0, text


def matching_examples(table: ExampleScores, rule: SelectionRule, per_class: bool) -> set[int]:
    """Positions of the examples that the rule names. `per_class`: within each label."""
    everything = range(len(table.ids))
    if rule.top is None:
        return {at for at in everything if rule.above < table.scores[at] < rule.below}
    classes = classes_of(table) if per_class else [everything]
    return {
        at
        for members in classes
        for at in sorted(members, key=lambda at: -table.scores[at])[: rule.size_of(len(members))]
    }


def classes_of(table: ExampleScores) -> list[Sequence[int]]:
    """The positions of the examples of each label."""
    assert table.labels is not None
    members: dict[str, list[int]] = {}
    for at, label in enumerate(table.labels):
        members.setdefault(label, []).append(at)
    return list(members.values())


def smaller_than_top(table: ExampleScores, rule: SelectionRule, per_class: bool) -> int:
    """How many classes (else: 1 for the whole table) have fewer examples than a number `top`."""
    if not isinstance(rule.top, int):
        return 0
    classes = classes_of(table) if per_class else [range(len(table.ids))]
    return sum(len(members) < rule.top for members in classes)
