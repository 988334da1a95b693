"""What a method receives and what it returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.methods.declaration import ValueOptions, WordOptions

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.cache.id_blocks import Ids
    from influence_cli.output.ranking import Entry, Ranking
    from influence_cli.run.checkpoints import Checkpoint
    from influence_cli.run.learning_rates import Weight
    from influence_cli.run.parameters import Column


@dataclass(frozen=True)
class ScoreRequest:
    """What is asked of a method: which examples, over which checkpoints, with which weights, and how the answer is split."""

    checkpoints: "tuple[Checkpoint, ...]"
    weights: "tuple[Weight, ...]"
    columns: "dict[str, Column]"
    train: "Ids"
    queries: "Ids" = range(0)
    sum_queries: bool = False
    normalize: bool = False
    by: str | None = None
    groups: "Groups | None" = None
    words: WordOptions | None = None
    values: ValueOptions | None = None

    @property
    def parts(self) -> list[str]:
        """Names of the parts of a score: steps, or layers in the model's order; one unnamed part without `by`."""
        if self.by == "checkpoint":
            return [str(checkpoint.step) for checkpoint in self.checkpoints]
        return (
            list(dict.fromkeys(column.layer for column in self.columns.values()))
            if self.by == "layer"
            else []
        )


@dataclass(frozen=True)
class Groups:
    """`--group-by`: group number of each training example (-1: not ranked), and the groups' names."""

    of: "np.ndarray"
    names: list[str]


@dataclass(frozen=True)
class ScoredQueries:
    """Scores of some queries, ranked. `queries`: their ids, or None for all as one; `parts`: names of the parts of each score.

    `split`: where each pair has parts of its own, (query position, entries) -> per entry its (part, score).
    """

    queries: "list[int] | None"
    ranking: "Ranking"
    parts: list[str]
    split: "Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]] | None" = None
