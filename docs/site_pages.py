"""Adds CHANGELOG.md and benchmarks/README.md to the site. mkdocs.yml names this file as a hook."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {"changelog.md": "CHANGELOG.md", "benchmarks.md": "benchmarks/README.md"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Their links lead to pages of docs/, which are beside them in the site."""
    for name, source in PAGES.items():
        text = re.sub(r"\]\((\.\./)?docs/", "](", (ROOT / source).read_text(encoding="utf-8"))
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    return markdown.replace("](../benchmarks/README.md", "](benchmarks.md")
