"""The documentation: links and anchors lead somewhere, each method has a page, and the site builds
without the network."""

import json
import os
import re
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from influence_cli.methods.table import METHODS
from tests.conftest import build_command

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(
    (
        *DOCS.rglob("*.md"),
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md")),
        *(ROOT / name / "README.md" for name in ("benchmarks", "faults")),
    )
)
CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


@cache
def list_anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs.yml make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line) for line in HEADING.findall(text)]
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


def find_broken_links(page: Path) -> list[str]:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    broken = []
    for link in LINK.findall(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        if re.match(r"[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in list_anchors(target.resolve())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_of_a_page_lead_somewhere(page):
    assert find_broken_links(page) == []


@pytest.mark.parametrize("link", ["missing.md", "page.md#missing", "#missing"])
def test_a_broken_link_is_found(link, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n[right](page.md#a-page) `[code](no.md)` [wrong]({link})\n")
    assert find_broken_links(page) == [link]


@pytest.mark.parametrize("method", METHODS)
def test_each_method_has_a_page_with_its_question_its_uses_and_its_source(method):
    page = DOCS / "methods" / f"{method}.md"
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"# {method}\n\n")
    assert "**Use it**" in text
    assert f"(methods/{method}.md)" in (DOCS / "methods.md").read_text(encoding="utf-8")
    if METHODS[method].source != "baseline":
        assert "ource**" in text


def test_each_page_is_in_the_navigation():
    names = set(re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert names == pages | {"benchmarks.md", "changelog.md"}


def test_each_answer_has_at_most_four_sentences_and_a_command():
    sections = (DOCS / "faq.md").read_text(encoding="utf-8").split("\n## ")[1:]
    for section in sections:
        answer, _, rest = section.partition("\n\n")[2].partition("```sh\n")
        assert "influence " in rest, section
        assert len(re.findall(r"[.?!](?=\s)", answer)) <= 4, section


COMMANDS = [
    (page, line)
    for page in PAGES
    for block in re.findall(r"^```.*?^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for line in re.findall(r"^(?:\$ )?(influence [a-z].*)$", block, re.M)
]


def test_each_flag_of_a_shown_command_is_a_flag_of_this_command():
    """Continuation lines and what follows a pipe or a comment are not read."""
    assert len(COMMANDS) > 100
    commands = build_command().commands
    for page, line in COMMANDS:
        name, *words = re.split(r" [|>] | #", line)[0].split()[1:]
        flags = {flag for parameter in commands[name].params for flag in parameter.opts}
        used = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= flags | {"--help"}, (str(page), line)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built in a process whose proxy leads nowhere."""
    if find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed")
    folder = tmp_path_factory.mktemp("site")
    proxies = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}
    ended = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(folder)],
        cwd=ROOT,
        env=os.environ | proxies | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def test_no_page_of_the_site_loads_from_the_network(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(list(DOCS.rglob("*.md")))
    loads = re.compile(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for page in pages:
        tags = [tag for tag in loads.findall(page.read_text()) if "canonical" not in tag]
        assert tags == [], page.name


def test_the_site_brings_the_index_of_its_search(site):
    index = json.loads((site / "search" / "search_index.json").read_text())
    assert any("methods/tracin.html" in entry["location"] for entry in index["docs"])
