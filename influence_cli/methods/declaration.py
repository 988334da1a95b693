"""What a method declares to the command line before it runs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
