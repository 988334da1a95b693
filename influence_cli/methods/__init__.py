"""The methods, as a table. A method is one file, one line here and one test file; its module is imported when it is used."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.cache.id_blocks import Ids
    from influence_cli.output.ranking import Entry, Ranking
    from influence_cli.run import Checkpoint, Column
    from influence_cli.run.learning_rates import Weight


@dataclass(frozen=True)
class Method:
    """What the command line needs to know of a method before it runs."""

    module: str
    about: str
    weighted: bool = True  # by learning rates
    checkpoints: str = "all"  # or "one"
    normalized: bool = False  # is a cosine already
    parts: tuple[str, ...] = ("checkpoint", "layer")  # what --by can split its scores into
    words: bool = False  # reads an embedding's words, not parameters
    curvatures: tuple[
        str, ...
    ] = ()  # of methods that go by the recorded order of training; the first is the default

    @property
    def ordered(self) -> bool:
        return bool(self.curvatures)

    def options(self, **given: Any) -> "ValueOptions | None":
        """Flags of methods that go by the order of training; None for others."""
        return (
            ValueOptions(**(given | {"curvature": given.get("curvature") or self.curvatures[0]}))
            if self.ordered
            else None
        )

    def score(self) -> Callable[..., Any]:
        return importlib.import_module(f"influence_cli.methods.{self.module}").score

    def trace(self) -> Callable[..., Any]:
        """Scores over training time; of `ordered` methods."""
        return importlib.import_module(f"influence_cli.methods.{self.module}").trace


METHODS = {
    "tracin": Method("tracin", "sum over checkpoints of learning rate x gradient dot product"),
    "grad-dot": Method(
        "tracin", "gradient dot product at one checkpoint", weighted=False, checkpoints="one"
    ),
    "grad-cos": Method(
        "tracin",
        "gradient cosine at one checkpoint",
        weighted=False,
        checkpoints="one",
        normalized=True,
    ),
    "dve": Method(
        "dve",
        "data value embedding: what leaving the example out of a step would have done",
        weighted=False,
        curvatures=("fisher", "none"),
        parts=("step", "checkpoint", "layer"),
    ),
    "unroll": Method(
        "unroll",
        "dve with the loss's exact curvature, from the model itself: nearest to training again",
        weighted=False,
        curvatures=("hessian", "gauss-newton"),
        parts=("step", "checkpoint", "layer"),
    ),
    "tracin-we": Method(
        "tracin_we",
        "tracin through word embeddings, down to the word",
        words=True,
        parts=("checkpoint", "word"),
    ),
}


@dataclass(frozen=True)
class WordOptions:
    """Which words count: `special` keep, drop or only; `top` words of each text by gradient norm; words near the query's."""

    special: str = "keep"
    pad_id: int | None = None
    top: int | None = None
    synonyms: int = 0


@dataclass(frozen=True)
class ValueOptions:
    """How training is gone back over. `curvature`: one of the method's; `form`: query, embedding, or None for the cheaper; `embeddings`:
    where they are kept; `at`: step of the checkpoint that is explained, None for the last; `renormalize`: the others of a step share the
    weight of the example left out; `replay`: the recorded steps are run again, and each gradient taken where its step was."""

    curvature: str
    form: str | None = None
    embeddings: Path | None = None
    at: int | None = None
    renormalize: bool = False
    replay: bool = False


@dataclass(frozen=True)
class Question:
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
class Answer:
    """Scores of some queries, ranked. `queries`: their ids, or None for all as one; `parts`: names of the parts of each score.

    `split`: where each pair has parts of its own, (query position, entries) -> per entry its (part, score).
    """

    queries: "list[int] | None"
    ranking: "Ranking"
    parts: list[str]
    split: "Callable[[int, Sequence[Entry]], list[list[tuple[str, float]]]] | None" = None
