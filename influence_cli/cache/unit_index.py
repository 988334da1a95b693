"""Which unit holds which example of which column; reads rows across units."""

from collections.abc import Sequence

import numpy as np

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.unit_file import Level, RowDecoder, Unit, fetch_unit
from influence_cli.cache.verification import Verification
from influence_cli.errors import CacheError


class UnitIndex:
    """The units of one (settings, checkpoint, split) folder, searchable by example."""

    def __init__(self, units: Sequence[Unit], verification: Verification | None = None) -> None:
        self.units, self.verification = tuple(units), verification or Verification()
        ranges = np.array([(unit.start, unit.stop) for unit in units], dtype=np.int64)
        starts, stops = ranges.reshape(-1, 2).T
        self._order = np.argsort(starts, kind="stable")
        self._starts = starts[self._order]
        # the largest stop among the units up to each one
        self._max_stops = np.maximum.accumulate(stops[self._order])
        self._kinds = {(unit.columns, unit.level) for unit in units}
        # starts and stops of the units that have every example of their range
        self._complete: dict[tuple[tuple[str, ...], Level], tuple[np.ndarray, np.ndarray]] = {}
        for kind in self._kinds:
            complete = sorted(
                (unit.start, unit.stop)
                for unit in units
                if unit.ids is None and (unit.columns, unit.level) == kind
            )
            if complete:
                ranges = np.array(complete, dtype=np.int64)
                self._complete[kind] = ranges[:, 0], ranges[:, 1]

    def touches(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
        """(R,) whether a unit may have any example of each range low..high."""
        if not self.units:
            return np.zeros(len(low), dtype=bool)
        last = np.searchsorted(self._starts, high) - 1  # that starts before the range ends
        return (last >= 0) & (self._max_stops[last] > low)

    def covers(
        self, columns: Sequence[str], level: Level, low: np.ndarray, high: np.ndarray
    ) -> np.ndarray:
        """(R,) whether one unit surely has these columns for every example of each range."""
        covered = np.zeros(len(low), dtype=bool)
        for (unit_columns, unit_level), (starts, stops) in self._complete.items():
            if set(columns) <= set(unit_columns) and level in (unit_level, "norms"):
                last = np.searchsorted(starts, low, side="right") - 1
                covered |= (last >= 0) & (stops[last] >= high)
        return covered

    def locate(self, column: str, level: Level, ids: np.ndarray) -> np.ndarray:
        """(N,) for each of these rising ids the number of the first unit that has the column at
        this level, or -1. Every unit has norms."""
        numbers = np.full(len(ids), -1)
        if not len(ids) or not self.units:
            return numbers
        last = np.searchsorted(self._starts, ids[-1], side="right")
        first = np.searchsorted(self._max_stops, ids[0], side="right")
        for number in np.sort(self._order[first:last]):
            unit = self.units[number]
            if column in unit.columns and level in (unit.level, "norms"):
                numbers = np.where((numbers < 0) & (unit.find_rows(ids) >= 0), number, numbers)
        return numbers

    def read_rows(self, columns: Sequence[str], level: Level, ids: np.ndarray) -> GradientRows:
        """The rows of these examples, in this order, from whichever units have them."""
        return self.fetch_rows(columns, level, ids)()

    def fetch_rows(self, columns: Sequence[str], level: Level, ids: np.ndarray) -> RowDecoder:
        """Reads the rows from disk; returns a function that decodes them. Every column must have
        every example."""
        parts: list[tuple[list[np.ndarray], list[RowDecoder]]] = []
        for numbers, members in self._group_columns(columns, level, ids):
            if (numbers < 0).any():
                raise CacheError(
                    f"the cache has no gradients of {members[0]} any more",
                    "its files were probably removed during the work",
                    "re-run the command: it computes the missing gradients again",
                )
            # np.unique would import numpy.ma
            positions = [np.flatnonzero(numbers == n) for n in sorted(set(numbers.tolist()))]
            decoders = [
                fetch_unit(self.units[numbers[at[0]]], members, level, ids[at], self.verification)
                for at in positions
            ]
            parts.append((positions, decoders))

        def decode() -> GradientRows:
            gathered = []
            for positions, decoders in parts:
                rows = concat_rows([decode_part() for decode_part in decoders])
                if len(positions) > 1:
                    rows = rows.take(np.argsort(np.concatenate(positions)))
                gathered.append(rows)
            sqnorms = {name: rows.sqnorms[name] for rows in gathered for name in rows.sqnorms}
            forms = {name: rows.forms[name] for rows in gathered for name in rows.forms}
            return GradientRows(ids, gathered[0].losses, gathered[0].digests, sqnorms, forms)

        return decode

    def _group_columns(
        self, columns: Sequence[str], level: Level, ids: np.ndarray
    ) -> list[tuple[np.ndarray, list[str]]]:
        """The columns by where their examples are: ((N,) unit numbers, columns)."""
        if len(self._kinds) == 1 and set(columns) <= set(self.units[0].columns):
            return [(self.locate(columns[0], level, ids), list(columns))]
        groups: dict[bytes, list[str]] = {}
        for column in columns:
            groups.setdefault(self.locate(column, level, ids).tobytes(), []).append(column)
        return [(np.frombuffer(key, dtype=np.int64), names) for key, names in groups.items()]
