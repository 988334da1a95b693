"""What a request lacks, as units of work in order. A unit is made when it is asked for, so that a billion rows are planned as numbers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from influence_cli.cache.id_blocks import Ids, cut
from influence_cli.cache.store import Level, Unit, UnitIndex
from influence_cli.run import Checkpoint


@dataclass(frozen=True)
class Job:
    """One unit of work: the columns that these examples lack at this checkpoint."""

    checkpoint: Checkpoint
    unit: Unit
    ids: np.ndarray


Lacking = tuple[Sequence[str], np.ndarray]  # columns, and the examples that lack one of them


@dataclass
class Stretch:
    """Units of one checkpoint by their first example: whole blocks of the grid, or `some` of their examples or columns."""

    checkpoint: Checkpoint
    ids: Ids
    starts: np.ndarray
    some: dict[int, Lacking] = field(default_factory=dict)


class Missing(Sequence[Job]):
    """Jobs of a request. `size`: of a unit; `unit(checkpoint, columns, start, ids)`: what would hold these examples."""

    def __init__(
        self,
        columns: Sequence[str],
        level: Level,
        size: int,
        unit: Callable[[Checkpoint, Sequence[str], int, np.ndarray], Unit],
    ) -> None:
        self.columns, self.level, self.size, self.unit = list(columns), level, size, unit
        self.examples = 0
        self.stretches: list[Stretch] = []

    def add(self, checkpoint: Checkpoint, ids: Ids, held: UnitIndex) -> None:
        """What is not held of these examples at a checkpoint."""
        if not isinstance(ids, range):
            looked_at = {int(block[0]): block for block in cut(ids, self.size)}
            starts = np.array([], dtype=np.int64)
        else:
            grid = (
                np.arange(ids.start // self.size * self.size, ids.stop, self.size)
                if len(ids)
                else np.array([], dtype=np.int64)
            )
            low, high = np.maximum(grid, ids.start), np.minimum(grid + self.size, ids.stop)
            untouched = ~held.touches(low, high)
            asked = np.flatnonzero(~untouched & ~held.covers(self.columns, self.level, low, high))
            looked_at = {int(grid[i]): np.arange(low[i], high[i]) for i in asked}
            starts = grid[untouched]
            self.examples += int((high - low)[untouched].sum())
        some = {
            start: lacking
            for start, block in looked_at.items()
            if len((lacking := self._lacking(held, block))[1])
        }
        self.examples += sum(len(absent) for _, absent in some.values())
        starts = np.union1d(starts, np.array(list(some), dtype=np.int64))
        self.stretches.append(Stretch(checkpoint, ids, starts, some))

    def _lacking(self, held: UnitIndex, block: np.ndarray) -> Lacking:
        lacking = {column: held.where(column, self.level, block) < 0 for column in self.columns}
        absent = block[np.logical_or.reduce(list(lacking.values()))]
        return [column for column in self.columns if lacking[column].any()], absent

    def __len__(self) -> int:
        return sum(len(stretch.starts) for stretch in self.stretches)

    def __iter__(self) -> Iterator[Job]:
        return (
            self._job(stretch, int(start)) for stretch in self.stretches for start in stretch.starts
        )

    def __getitem__(self, number: int) -> Job:  # type: ignore[override]
        for stretch in self.stretches:
            if number < len(stretch.starts):
                return self._job(stretch, int(stretch.starts[number]))
            number -= len(stretch.starts)
        raise IndexError(number)

    def _job(self, stretch: Stretch, start: int) -> Job:
        if start in stretch.some:
            columns, ids = stretch.some[start]
        else:
            columns, ids = (
                self.columns,
                np.arange(max(start, stretch.ids[0]), min(start + self.size, stretch.ids[-1] + 1)),
            )
        return Job(
            stretch.checkpoint,
            self.unit(stretch.checkpoint, columns, start // self.size * self.size, ids),
            ids,
        )
