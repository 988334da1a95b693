"""The units of work that a request lacks, in order.

A plan of a billion rows is a few numbers: it makes a WorkUnit when someone asks for it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.cache.unit_file import Level, Unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.run.checkpoints import Checkpoint


@dataclass(frozen=True)
class WorkUnit:
    """A unit to compute: these examples lack the unit's columns at this checkpoint."""

    checkpoint: Checkpoint
    unit: Unit
    ids: np.ndarray


# makes the unit file's description: (checkpoint, columns, first example of the block, ids)
UnitFactory = Callable[[Checkpoint, Sequence[str], int, np.ndarray], Unit]
PartialBlock = tuple[Sequence[str], np.ndarray]  # columns, and the ids that lack one of them


@dataclass
class CheckpointWork:
    """The work of one checkpoint. `starts`: the first example of each block. A block lacks all of
    its examples and columns, or only those that `partial` names.
    """

    checkpoint: Checkpoint
    ids: Ids
    starts: np.ndarray
    partial: dict[int, PartialBlock] = field(default_factory=dict)


class WorkPlan(Sequence[WorkUnit]):
    """The units of work of a request. `size`: examples of a block."""

    def __init__(
        self, columns: Sequence[str], level: Level, size: int, unit_for: UnitFactory
    ) -> None:
        self.columns, self.level, self.size, self.unit_for = list(columns), level, size, unit_for
        self.examples = 0
        self.checkpoints: list[CheckpointWork] = []

    def add(self, checkpoint: Checkpoint, ids: Ids, index: UnitIndex) -> None:
        """Add what these examples lack at a checkpoint. `index`: the units that exist there."""
        if isinstance(ids, range):
            starts, blocks = self._blocks_of_range(ids, index)
        else:
            starts = np.array([], dtype=np.int64)
            blocks = {int(block[0]): block for block in cut_ids(ids, self.size)}
        partial = {}
        for start, block in blocks.items():
            columns, lacking_ids = self._lacking(index, block)
            if len(lacking_ids):
                partial[start] = columns, lacking_ids
                self.examples += len(lacking_ids)
        if partial:
            starts = np.union1d(starts, np.array(list(partial), dtype=np.int64))
        self.checkpoints.append(CheckpointWork(checkpoint, ids, starts, partial))

    def _blocks_of_range(
        self, ids: range, index: UnitIndex
    ) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """The starts of blocks that no unit touches, and the blocks that units hold in part."""
        if not len(ids):
            return np.array([], dtype=np.int64), {}
        grid = np.arange(ids.start // self.size * self.size, ids.stop, self.size)
        low, high = np.maximum(grid, ids.start), np.minimum(grid + self.size, ids.stop)
        untouched = ~index.touches(low, high)
        uncertain = np.flatnonzero(~untouched & ~index.covers(self.columns, self.level, low, high))
        self.examples += int((high - low)[untouched].sum())
        return grid[untouched], {int(grid[i]): np.arange(low[i], high[i]) for i in uncertain}

    def _lacking(self, index: UnitIndex, block: np.ndarray) -> PartialBlock:
        lacking = {column: index.locate(column, self.level, block) < 0 for column in self.columns}
        columns = [column for column in self.columns if lacking[column].any()]
        return columns, block[np.logical_or.reduce(list(lacking.values()))]

    def __len__(self) -> int:
        return sum(len(work.starts) for work in self.checkpoints)

    def __iter__(self) -> Iterator[WorkUnit]:
        for work in self.checkpoints:
            for start in work.starts:
                yield self._unit(work, int(start))

    def __getitem__(self, number: int) -> WorkUnit:  # type: ignore[override]  # no slices
        for work in self.checkpoints:
            if number < len(work.starts):
                return self._unit(work, int(work.starts[number]))
            number -= len(work.starts)
        raise IndexError(number)

    def _unit(self, work: CheckpointWork, start: int) -> WorkUnit:
        if start in work.partial:
            columns, ids = work.partial[start]
        else:
            columns = self.columns
            ids = np.arange(max(start, work.ids[0]), min(start + self.size, work.ids[-1] + 1))
        block_start = start // self.size * self.size
        return WorkUnit(
            work.checkpoint, self.unit_for(work.checkpoint, columns, block_start, ids), ids
        )
