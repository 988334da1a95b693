"""Figures of quality from a table of `evaluate`, for a page."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from influence_cli.errors import TableError, shown
from influence_cli.output.score_tables import WRITE_AGAIN, parse_finite
from influence_cli.output.table_record import Record

QUALITY_COLUMNS = ("method", "protocol", "figure", "value")
PARTS = ("query", "layer")  # columns of --by
ALL = "all"


@dataclass(frozen=True)
class QualityFigure:
    """One row. `interval`: the ends of its 95 % interval, or None."""

    method: str
    protocol: str
    name: str
    value: float | None
    interval: tuple[float, float] | None
    count: str
    cost: str


@dataclass
class QualityTable:
    """The figures about all queries. `others`: the number of rows about one query or layer."""

    name: str
    columns: list[str]
    record: Record | None
    written: str = ""
    figures: list[QualityFigure] = field(default_factory=list)
    others: int = 0

    def add(self, line: int, cells: Sequence[object]) -> None:
        """Raises TableError for a row with another number of cells, or a value that is none."""
        if len(cells) != len(self.columns):
            problem = f"{len(cells)} columns, expected {len(self.columns)}"
            raise TableError(f"{self.name}, line {line}: {problem}", WRITE_AGAIN)
        row = dict(zip(self.columns, cells, strict=True))
        if any(str(row[part]) != ALL for part in PARTS if part in row):
            self.others += 1
            return
        value = parse_finite(row["value"])
        if value is None and row["value"] not in (None, ""):
            problem = f"value is {shown(row['value'])}, expected a number"
            raise TableError(f"{self.name}, line {line}: {problem}", WRITE_AGAIN)
        low, high = (parse_finite(row.get(end)) for end in ("low", "high"))
        interval = (low, high) if low is not None and high is not None else None
        texts = {column: "" if cell is None else str(cell) for column, cell in row.items()}
        self.figures.append(
            QualityFigure(
                texts["method"], texts["protocol"], texts["figure"], value, interval,
                texts.get("n", ""), texts.get("cost", ""),
            )
        )  # fmt: skip
