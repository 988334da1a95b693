"""Messages for Python programs: a flag gets the name of its argument.

The rooms below name flags. `--lr-weights half: unknown` becomes `lr_weights='half': unknown`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from influence_cli.errors import InfluenceError, known_error
from influence_cli.methods.declaration import option_texts
from influence_cli.methods.table import METHODS
from influence_cli.progress import Advance, Reporter

OF_OPEN_RUN = (
    *("definition", "checkpoints", "trajectory", "cache", "verify", "device", "batch_size"),
    *("precision", "store", "project", "projection", "seed", "progress"),
)
ARGUMENTS = (
    *OF_OPEN_RUN,
    *("method", "queries", "train", "query", "query_file", "candidates", "top", "by", "group_by"),
    *("aggregate", "sum_queries", "normalize", "lr", "lr_weights", "steps", "layers", "shard"),
    *("sort", "format", "safe_cells"),
)
# values that messages name without a sign that they are values
WORDS = ("all", "none", "auto", "point", "rank", "layer", "label", "float16", "float32", "csv")
# --flag, and a value: a placeholder, a number, a quoted text, a known word, or what a colon ends
FLAG = re.compile(
    r"(?<![\w-])--(?P<flag>[a-z][a-z-]*[a-z])"
    r"( (?P<plain>[A-Z]+\b|-?\d+(\.\d+)?(?![\w:,.%/])|'[^']*')"
    r"| (?P<text>WORD\b(?!:)|[^\s:]\S*(?=: )))?"
)


def rename_flags(text: str) -> str:
    """The text, with the arguments of Python instead of flags."""
    names = {option for method in METHODS.values() for option in option_texts(method.options)}
    names.update(ARGUMENTS)
    words = "|".join(map(re.escape, (*METHODS, *WORDS)))
    pattern = re.compile(FLAG.pattern.replace("WORD", f"({words})"))

    def rename(match: re.Match[str]) -> str:
        name = match["flag"].replace("-", "_")
        if name not in names:
            return match[0]
        if match["text"] is not None:
            value = match["text"]
            return f"{name}={value if value.lstrip('-').isdecimal() else repr(value)}"
        return name if match["plain"] is None else f"{name}={match['plain']}"

    return re.sub(r"(?<![\w-])-o (FILE\b|DIR\b)?", "path ", pattern.sub(rename, text))


@contextmanager
def python_messages() -> Iterator[None]:
    """Errors of the block name arguments instead of flags, and no --debug."""
    try:
        yield
    except (InfluenceError, MemoryError, RuntimeError, OSError) as error:
        known = known_error(error)
        if known is None:
            raise
        details = [rename_flags(text) for text in known.details if "--debug" not in text]
        known.headline, known.details = rename_flags(known.headline), tuple(details)
        known.args = (known.headline, *known.details)
        if known is error:
            raise
        raise known from error


class NoteList(Reporter):
    """Keeps the notes of a call, and passes them on."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        text = rename_flags(message)
        if text not in self.notes:
            self.notes.append(text)
        self._reporter.note(text)

    @contextmanager
    def progress(self, doing: str, total: int) -> Iterator[Advance]:
        with self._reporter.progress(doing, total) as advance:
            yield advance
