"""What a protocol declares about itself, and what it receives.

This module imports no torch, so that `--help` answers at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_cli.methods.declaration import option_texts

if TYPE_CHECKING:
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.request import ScoreRequest
    from influence_cli.run.checkpoints import Checkpoint

Row = tuple[Any, ...]  # Any: text and numbers


@dataclass(frozen=True)
class Protocol:
    """One protocol: how good are scores on the run at hand?

    `columns`: of its table. `method_options`: options of methods that it passes on.
    """

    name: str
    help: str
    columns: tuple[str, ...]
    evaluate: "Callable[[GradientSource, EvaluationRequest], Iterator[Row]]"
    options: type
    example: str
    default_methods: tuple[str, ...]
    method_options: tuple[str, ...] = ()

    @property
    def flags(self) -> tuple[str, ...]:
        """Names of all its options."""
        return (*option_texts(self.options), *self.method_options)


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate. `requests`: for each method, without training examples and parts."""

    requests: "dict[str, ScoreRequest]"
    checkpoints: "tuple[Checkpoint, ...]"
    queries: "Ids"
    options: object  # of the protocol's own class
    seed: int
    folder: Path | None = None  # of the cache; None: nothing is stored
