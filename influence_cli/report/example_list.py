"""The examples of a page, each once, with label, text and the user's own id."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from influence_cli.errors import TableError, shown

TRAIN, QUERY, GROUP = "train", "query", "group"  # the spaces of ids
ALL_QUERIES = "all"  # the query of a table that sums over queries


class ExampleTexts(NamedTuple):
    """What a table says of an example. None: the table has no such column."""

    label: str | None = None
    text: str | None = None
    own_id: str | None = None


class ExampleKey(NamedTuple):
    """`space`: TRAIN, QUERY or GROUP. `id`: as the table has it."""

    space: str
    id: str

    @property
    def dataset_index(self) -> int | None:
        """The index in the run's dataset; None for a group, and for the sum of all queries."""
        is_index = self.space != GROUP and self.id.isascii() and self.id.isdigit()
        return int(self.id) if is_index else None


@dataclass
class ExampleList:
    """Examples in the order of their first row. `sources`: the table that each came from."""

    numbers: dict[ExampleKey, int] = field(default_factory=dict)
    texts: list[ExampleTexts] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[ExampleKey, ExampleTexts]]:
        return zip(self.numbers, self.texts, strict=True)

    def add(self, key: ExampleKey, texts: ExampleTexts, source: str) -> int:
        """The number of an example. Raises TableError where two tables disagree about it."""
        number = self.numbers.setdefault(key, len(self.texts))
        if number == len(self.texts):
            self.texts.append(texts)
            self.sources.append(source)
        elif texts != self.texts[number]:
            self.texts[number] = self.join_texts(key, number, texts, source)
        return number

    def join_texts(
        self, key: ExampleKey, number: int, texts: ExampleTexts, source: str
    ) -> ExampleTexts:
        """What two tables say together. Raises TableError where they disagree."""
        first = self.texts[number]
        for name, value, other in zip(ExampleTexts._fields, first, texts, strict=True):
            if value is not None and other is not None and value != other:
                names = dict.fromkeys((self.sources[number], source))
                verb = "disagrees with itself" if len(names) == 1 else "are not of the same data"
                raise TableError(
                    f"{' and '.join(names)} {verb}: the {name.replace('_', ' ')} of {key.space} "
                    f"{key.id} differs",
                    f"found: {shown(value)} and {shown(other)}",
                    "write a page for each run",
                )
        pairs = zip(first, texts, strict=True)
        return ExampleTexts(*(other if value is None else value for value, other in pairs))
