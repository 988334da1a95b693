"""Protocols that tell how good scores are on the run at hand, as a table: one file and one line each."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.run.checkpoints import Checkpoint


@dataclass(frozen=True)
class Protocol:
    """What the command line needs to know of a protocol before it runs."""

    module: str
    about: str
    columns: tuple[str, ...]

    def run(self) -> "Callable[[GradientSource, EvaluationRequest], Iterator[tuple[Any, ...]]]":
        """(gradients, what is asked) -> rows of its columns."""
        return importlib.import_module(f"influence_cli.evaluate.{self.module}").evaluate


PROTOCOLS = {
    "tsloo": Protocol(
        "tsloo",
        "one example is left out of one step, and training goes on from there to its end",
        ("method", "query", "spearman", "pearson", "removals", "effect", "noise", "query_label"),
    ),
}


@dataclass(frozen=True)
class EvaluationRequest:
    """What is evaluated, and how thoroughly. `questions`: what each method is asked, but for training examples and parts."""

    questions: "dict[str, ScoreRequest]"
    checkpoints: "tuple[Checkpoint, ...]"
    queries: "Ids"
    removals: int
    seed: int
    renormalize: bool = False
    folder: Path | None = None  # the cache's; None: nothing is kept
