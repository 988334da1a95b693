"""What a protocol declares about itself, what it receives, and the table that all protocols share.

This module imports no torch, so that `--help` answers at once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_cli.errors import UsageProblem, counted
from influence_cli.methods.declaration import option_texts
from influence_cli.progress import Reporter, format_duration

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.run.checkpoints import Checkpoint

Row = tuple[Any, ...]  # Any: text and numbers
# (tables, options of the protocol, seed, reporter) -> figures; Any: of the protocol's own class
CompareTables = Callable[[Sequence["ScoreTable"], Any, int, Reporter], Iterator["Figure"]]
COLUMNS = ("method", "protocol", "figure", "value", "low", "high", "n", "cost")
CURVATURE_OPTIONS = ("curvature", "damping", "fisher", "solver", "replay", "renormalize")
ALL = "all"  # the part of a figure that is about all queries, or all layers
RETRAININGS_HELP = (
    "Trainings with other random seeds, whose results are averaged; needs train(indices, seed) in "
    "definition.py."
)
TRAINING = "retraining"  # in the column `method`: a figure of the measurements, not of scores


@dataclass(frozen=True)
class ScoreTable:
    """Scores of one file, or of one method on one run. `read`: query -> training id -> score."""

    name: str
    read: Callable[[], dict[str, dict[str, float]]]

    def read_inside(self, block: Callable[[], AbstractContextManager[None]]) -> "ScoreTable":
        """The same table, read in a block."""

        def read() -> dict[str, dict[str, float]]:
            with block():
                return self.read()

        return ScoreTable(self.name, read)


@dataclass(frozen=True)
class Figure:
    """One number of the table, about the scores of a method. An absent number is an empty cell.

    `low`, `high`: its 95 % interval. `count`: how many numbers it was computed from. `part`: the
    query or layer that it is about. `cost`: of the measurements behind it.
    """

    method: str
    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    count: int | None = None
    cost: str = ""
    part: str = ALL


@dataclass(frozen=True)
class Protocol:
    """One protocol: how good are scores on the run at hand?

    `methods`: those that it can evaluate, () for all. `beside`: methods that it adds to those of
    the user. `method_options`: options of methods that it passes on. `parts`: values of --by.
    `compare_tables`: what it does with score files and run folders. It replaces `evaluate`.
    `evaluates_files`: whether `evaluate` takes score files beside methods.
    """

    name: str
    help: str
    evaluate: "Callable[[GradientSource, EvaluationRequest], Iterator[Figure]]"
    options: type
    example: str
    default_methods: tuple[str, ...]
    methods: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    method_options: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("query",)
    compare_tables: "CompareTables | None" = None
    evaluates_files: bool = False

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of all its options."""
        return (*option_texts(self.options), *self.method_options)

    def check_method(self, method: str) -> None:
        """Raises UsageProblem for a method that the protocol can't evaluate."""
        if self.methods and method not in self.methods:
            raise UsageProblem(
                f"--method {method} does not apply to {self.name}",
                f"expected: {', '.join(self.methods)}",
            )

    def check_files(self, files: Sequence[Path]) -> None:
        """Raises UsageProblem for score files that the protocol can't use."""
        if files and self.compare_tables is None and not self.evaluates_files:
            raise UsageProblem(
                f"{self.name} takes no score files",
                f"found: {', '.join(map(str, files))}",
                "leave out the files",
            )

    def check_queries(self, queries: str | None) -> None:
        """Raises UsageProblem for --queries, where no figure is about queries."""
        if queries is not None and "query" not in self.parts:
            raise UsageProblem(
                f"--queries does not apply to {self.name}: it explains no queries",
                "leave out --queries",
            )

    def check_part(self, part: str | None) -> None:
        """Raises UsageProblem for a value of --by that the protocol does not have."""
        if part is not None and part not in self.parts:
            raise UsageProblem(
                f"--by {part} does not apply to {self.name}",
                f"expected: {', '.join(self.parts)}" if self.parts else "leave out --by",
            )


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate. `requests`: for each method, without training examples and parts.
    `score_files`: tables of scores to evaluate, too.
    """

    requests: "dict[str, ScoreRequest]"
    checkpoints: "tuple[Checkpoint, ...]"
    queries: "Ids"
    options: object  # of the protocol's own class
    seed: int
    folder: Path | None = None  # of the cache; None: nothing is stored
    by: str | None = None
    score_files: Sequence[Path] = ()


def table_columns(by: str | None) -> tuple[str, ...]:
    """The columns of the table. `--by query` adds the column `query` behind `figure`."""
    return COLUMNS if by is None else (*COLUMNS[:3], by, *COLUMNS[3:])


def table_rows(protocol: str, figures: Iterable[Figure], by: str | None) -> Iterator[Row]:
    """The rows of the table. Without `by` only those about all queries."""
    for figure in figures:
        if by is None and figure.part != ALL:
            continue
        part = () if by is None else (figure.part,)
        interval = figure.value, figure.low, figure.high
        yield (figure.method, protocol, figure.name, *part, *interval, figure.count, figure.cost)


def describe_cost(trainings: int, seconds: float | None) -> str:
    """`40 trainings, 12.3 s`. `seconds`: None where they are unknown."""
    text = counted(trainings, "training")
    return text if seconds is None else f"{text}, {format_duration(seconds)}"
