"""Rows from the command line that replace a dataset of the definition."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from influence_cli.errors import DataError, listed
from influence_cli.run.definition import Definition, describe_failure


class Rows(Protocol):
    """Column -> value, by the number of a row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...  # Any: what a file holds


@dataclass(frozen=True)
class GivenRows:
    """`source`: the flag and its value, as messages name them. `digest`: of the content of all
    rows, which names their place in the cache."""

    rows: Rows
    source: str
    digest: str


class GivenExamples:
    """A map-style dataset: the examples that the definition's `example(row)` makes of the rows.

    `labels`: by row, for rows that have none; `relabel(example, label)` sets them.
    """

    def __init__(self, definition: Definition, given: GivenRows) -> None:
        self._definition, self._given = definition, given
        self.labels: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._given.rows)

    def __getitem__(self, index: int) -> Any:  # Any: the user's example
        """Raises DataError that names the row, where the definition can't make an example of it."""
        row = self._given.rows[index]
        item = self._call("example", index, row, row)
        if index in self.labels:
            return self._call("relabel", index, row, item, self.labels[index])
        return item

    def _call(self, name: str, index: int, row: Mapping[str, Any], *arguments: Any) -> Any:
        place, columns = f"row {index} of {self._given.source}", f"its columns: {listed(row)}"
        try:
            value = self._definition.raw(name)(*arguments)
        except (Exception, SystemExit) as error:
            why = describe_failure(self._definition, name, error)
            raise DataError(f"{place}: {why.headline}", columns, *why.details) from error
        if value is None:
            raise DataError(
                f"{place}: {name}() returned None", columns, "expected: one example, by `return`"
            )
        return value
