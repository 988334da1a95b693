"""What a method receives, and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.methods.declaration import NoOptions

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.cache.id_blocks import Ids
    from influence_cli.output.ranking import Entry, RankedQueries
    from influence_cli.run.checkpoints import Checkpoint
    from influence_cli.run.learning_rates import Weight
    from influence_cli.run.parameters import Column


@dataclass(frozen=True)
class ScoreRequest:
    """Which examples to score, over which checkpoints, with which weights, and split by what.

    `sum_queries`: all queries count as one, by their mean. `options`: of the method's own class.
    `seed`: of everything that is drawn at random.
    """

    checkpoints: "tuple[Checkpoint, ...]"
    weights: "tuple[Weight, ...]"
    columns: "dict[str, Column]"
    train: "Ids"
    queries: "Ids" = range(0)
    sum_queries: bool = False
    normalize: bool = False
    by: str | None = None
    groups: "Groups | None" = None
    options: object = NoOptions()
    seed: int = 0

    @property
    def parts(self) -> list[str]:
        """Names of the parts of a score: steps, or layers in the model's order; [] without `by`."""
        if self.by == "checkpoint":
            return [str(checkpoint.step) for checkpoint in self.checkpoints]
        if self.by == "layer":
            return list(dict.fromkeys(column.layer for column in self.columns.values()))
        return []


@dataclass(frozen=True)
class Groups:
    """`--group-by`: group number of each training example (-1: not ranked), and group names."""

    of: "np.ndarray"
    names: list[str]


@dataclass(frozen=True)
class ScoredQueries:
    """Ranked scores of some queries.

    `queries`: their ids, or None for all as one. `parts`: names of the parts of each score.
    `split`: where each pair has parts of its own, a function from a query's position and its
    entries to a list of (part, score) for each entry.
    """

    queries: "list[int] | None"
    ranking: "RankedQueries"
    parts: list[str]
    split: "Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]] | None" = None
