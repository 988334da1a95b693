"""Reads what a page holds, as a browser's parser does."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class PageParser(HTMLParser):
    """The tags of a page, the text between them, and the contents of its scripts by id."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._script = dict(attrs).get("id") or tag
            self.scripts[self._script] = ""

    def handle_endtag(self, tag: str) -> None:
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] += data


def parse_page(path: Path) -> PageParser:
    return PageParser(path.read_text(encoding="utf-8"))


def read_data(path: Path) -> Any:  # Any: JSON values
    return json.loads(parse_page(path).scripts["data"])


def read_pictures(path: Path) -> dict[str, str]:
    return json.loads(parse_page(path).scripts["pictures"])


def write_table(path: Path, columns: str, *rows: str) -> Path:
    path.write_text("\n".join([columns, *rows, ""]), encoding="utf-8")
    return path
