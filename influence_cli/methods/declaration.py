"""What a method declares about itself. The command line makes flags, help and refusals from it.

This module and the file of each method import no torch, so that `--help` answers at once.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource, IdsAt
    from influence_cli.methods.gradient_vectors import VectorMaps
    from influence_cli.methods.inner_products import SquaredNorms
    from influence_cli.methods.pairwise import RankingFactory
    from influence_cli.methods.request import ScoredQueries, ScoreRequest
    from influence_cli.methods.reverse.occurrences import Trace
    from influence_cli.methods.score_trial import ScoreTrial
    from influence_cli.run.parameters import Column
    from influence_cli.run.run import Run

# The values of options are typed by each method's own dataclass; here they are any object.
Score = Callable[["GradientSource", "ScoreRequest", "RankingFactory"], "Iterator[ScoredQueries]"]
TraceScores = Callable[["GradientSource", "ScoreRequest"], "Iterator[tuple[Ids, Trace]]"]
EstimateCost = Callable[["GradientSource", "ScoreRequest"], str]
# (source, request, whether training gradients are stored) -> a small part of `score`
OpenTrial = Callable[["GradientSource", "ScoreRequest", bool], "ScoreTrial"]
# (source, request) -> the squared norms that `self` sums, of the gradients of some rows, by column
OpenSqnorms = Callable[["GradientSource", "ScoreRequest"], "SquaredNorms"]
# (source, request) -> how the vectors whose inner products are scores differ from gradients
OpenVectors = Callable[["GradientSource", "ScoreRequest"], "VectorMaps"]
ListRows = Callable[["GradientSource", "ScoreRequest"], "list[IdsAt]"]
SelectColumns = Callable[["Run", Any], "dict[str, Column]"]  # Any: the method's options


@dataclass(frozen=True)
class OptionText:
    """How an option appears in help, and which values it allows."""

    help: str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    minimum: int | None = None


def option(
    default: Any,  # of the field's own type
    help: str,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    minimum: int | None = None,
) -> Any:  # dataclasses.field, which type checkers read as the field's type
    """A field of an options dataclass: `top_words` becomes the flag --top-words."""
    return field(default=default, metadata={"option": OptionText(help, metavar, choices, minimum)})


def flag_of(name: str) -> str:
    """`top_words` -> `--top-words`."""
    return f"--{name.replace('_', '-')}"


def option_texts(options: type) -> dict[str, OptionText]:
    """Field name -> text, of an options dataclass."""
    return {entry.name: entry.metadata["option"] for entry in fields(options)}


def deferred(path: str) -> Callable[..., Any]:  # Any: what the function takes and returns
    """`package.module:function`, imported when it is called: a method's heavy half."""
    module, _, function = path.partition(":")

    def call(*arguments: Any) -> Any:  # as above
        return getattr(importlib.import_module(module), function)(*arguments)

    return call


@dataclass(frozen=True)
class NoOptions:
    """The options of a method that has none."""


@dataclass(frozen=True)
class Method:
    """One method: what it answers, what it needs and costs, and its entry points.

    `question`: what a score answers, as a question. `help`: a few words for --method.
    `parts`: what --by splits its scores into; `pair_parts`: those that only pairs of examples
    have, not groups. `refuses`: flag -> why this method does not have it. `checkpoints`: "one"
    reads the last selected checkpoint. `weighted`: scores are weighted by learning rates.
    `ranks_share`: what the ranks of a torchrun job divide, the scores or only the gradients.
    `caches_train`: it reads gradients of training examples from the cache. `has_self`: an example
    has a score on itself; `open_sqnorms`: in another metric than that of plain norms.
    `open_vectors`: its scores are inner products of vectors, which `export` writes.
    """

    name: str
    help: str
    question: str
    needs: str
    cost: str
    source: str
    score: Score
    trace: TraceScores | None = None
    estimate_cost: EstimateCost | None = None  # one line for `inspect`
    open_trial: OpenTrial | None = None  # which `inspect` measures
    list_rows: ListRows | None = None  # the gradients it reads, where that is not all of them
    select_columns: SelectColumns | None = None  # None: the columns that --layers selects
    has_self: bool = False
    open_sqnorms: OpenSqnorms | None = None
    open_vectors: OpenVectors | None = None
    options: type = NoOptions
    parts: tuple[str, ...] = ("checkpoint", "layer")
    pair_parts: tuple[str, ...] = ()
    checkpoints: Literal["all", "one"] = "all"
    weighted: bool = True
    normalized: bool = False  # its scores are cosines already
    ranks_share: Literal["scores", "gradients"] = "scores"
    caches_train: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def follows_training(self) -> bool:
        """Whether it needs the order of training, which only knows the examples of train_data()."""
        return "trajectory" in self.needs

    def reason_against(self, flag: str) -> str | None:
        """Why the method does not have this flag; None where it has."""
        if not self.weighted and flag in ("--lr", "--lr-weights"):
            return "it has no learning-rate weights"
        if flag == "--candidates" and self.follows_training:
            return "it scores examples at the steps that trained on them"
        return self.refuses.get(flag)
