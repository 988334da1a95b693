"""Warnings of the user's code and of the libraries that it uses: each once, not once a batch.

Python forgets which warnings it showed whenever a library changes the filters, as torch does.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from influence_cli.output.visible import write_message


@contextmanager
def warnings_shown_once() -> Iterator[None]:
    """Show a warning at its first occurrence on a line of code, whatever numbers its text holds."""
    seen: set[tuple[str, str, int, str]] = set()

    def show_once(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        text = str(message)
        key = category.__name__, filename, lineno, re.sub(r"\d+", "0", text)
        if key not in seen:
            seen.add(key)
            write_message(f"warning: {text}\n  {category.__name__} at {filename} line {lineno}")

    previous, warnings.showwarning = warnings.showwarning, show_once
    try:
        yield
    finally:
        warnings.showwarning = previous
