"""Renders a page: template, style, script and data in one HTML text."""

import base64
import hashlib
import importlib.util
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_cli import __version__
from influence_cli.errors import UsageProblem
from influence_cli.report.collected_tables import PairTable, SelfTable
from influence_cli.report.example_list import ExampleList
from influence_cli.report.histogram import SIZE, describe_distribution, format_score
from influence_cli.report.quality import QualityTable
from influence_cli.report.table_files import Table
from influence_cli.report.views import (
    describe_examples,
    describe_self,
    describe_view,
    escape_acting,
    join_views,
    list_names,
)

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("page.js", "cards.js", "suspects.js", "views.js")
OPTIONS = ("checkpoints", "definition", "trajectory", "layers", "train", "queries")  # digests
STEP = re.compile("step-0*([0-9]+)-")
MOST_STEPS = 20  # that the overview lists
Json = Any  # Any: JSON values


@dataclass(frozen=True)
class PageContent:
    """What a page shows. `pictures`: number of an example -> data URL. `run`: its name or empty."""

    title: str
    tables: Sequence[Table]
    examples: ExampleList
    pictures: Mapping[int, str]
    run: str = ""


def require_jinja() -> None:
    """Raises UsageProblem without Jinja2."""
    if importlib.util.find_spec("jinja2") is None:
        raise UsageProblem(
            "a report needs Jinja2", "install it: pip install 'influence-cli[report]'"
        )


def render_page(content: PageContent) -> str:
    """The HTML text. It asks for nothing: its security policy forbids every request."""
    from markupsafe import Markup

    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = "".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    script = f'"use strict";(() => {{\n{script}\n}})();'
    views = join_views([table for table in content.tables if isinstance(table, PairTable)])
    lists = [table for table in content.tables if isinstance(table, SelfTable)]
    named_views = list(zip(list_names([view.base for view in views]), views, strict=True))
    named_lists = list(zip(list_names(lists), lists, strict=True))
    data = {
        "examples": describe_examples(content.examples),
        "views": [describe_view(view, name) for name, view in named_views],
        "lists": [describe_self(table, name) for name, table in named_lists],
    }
    distributions = [
        *((name, "scores", describe_distribution(view.base.scores)) for name, view in named_views),
        *((name, "self-influence", describe_distribution(t.scores)) for name, t in named_lists),
    ]
    return open_template().render(
        title=content.title,
        run=content.run,
        written=max((table.written for table in content.tables), default=""),
        version=__version__,
        view_names=[name for name, _ in named_views],
        queries=len({query for view in views for query in view.base.queries}),
        sources=[describe_source(table) for table in content.tables],
        quality=[table for table in content.tables if isinstance(table, QualityTable)],
        distributions=distributions,
        size=SIZE,
        has_list=bool(lists),
        style=Markup(style),
        script=Markup(script),
        style_digest=digest_source(style),
        script_digest=digest_source(script),
        data=Markup(embed_json(data)),
        pictures=Markup(embed_json(content.pictures)),
    )


def open_template() -> "Template":
    """The template of the page. It escapes every text."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["score"] = format_score
    return environment.get_template("page.html.j2")


def embed_json(value: Json) -> str:
    """JSON that no HTML parser takes for markup: `<` is `\\u003c`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return text.encode(errors="backslashreplace").decode()  # lone surrogates, as JSON writes them


def digest_source(text: str) -> str:
    """What a content security policy calls a style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def describe_source(table: Table) -> dict[str, Json]:
    """How a table was made, as lines of (name, value) for the overview."""
    record = table.record or {}
    request = record.get("request") or {}
    lines = [("File", table.name)] if table.name else []
    if table.written:
        lines.append(("Written", table.written))
    if request.get("method"):
        lines.append(("Method", str(request["method"])))
    command = record.get("command")
    if isinstance(command, list) and command:
        lines.append(("Command", describe_command_line(command)))
    versions = record.get("versions")
    if isinstance(versions, dict):
        lines.append(("Versions", ", ".join(f"{name} {text}" for name, text in versions.items())))
    if settings := describe_request(request):
        lines.append(("Settings", settings))
    if isinstance(request.get("definition"), str):
        lines.append(("Definition", f"sha256 {request['definition'][:16]}…"))
    if isinstance(checkpoints := request.get("checkpoints"), list):
        lines.append(("Checkpoints", describe_checkpoints(list(map(str, checkpoints)))))
    if not record:
        lines.append(("Record", "none: the table does not say how it was made"))
    return {"name": table.name, "lines": [(name, escape_acting(text)) for name, text in lines]}


def describe_command_line(command: list[Json]) -> str:
    """As a shell takes it. The program is named without its folder; a call in Python stays."""
    words = [str(word) for word in command]
    if len(words) == 1:
        return words[0]
    program = Path(words[0]).name
    return shlex.join(["influence" if program == "__main__.py" else program, *words[1:]])


def describe_checkpoints(names: Sequence[str]) -> str:
    """`steps 0, 120, 240`. `names`: with a digest each, such as step-000000120-c81de53c."""
    steps = [match[1] if (match := STEP.match(name)) else name for name in names]
    if len(steps) > MOST_STEPS:
        return f"{len(steps):,} checkpoints, steps {steps[0]} to {steps[-1]}"
    return f"steps {', '.join(steps)}"


def describe_request(request: Mapping[str, Json]) -> str:
    """What is set: `normalize True, lr 0.1`."""
    names = {"command", "method", "options", "settings", *OPTIONS}
    options = request.get("options")
    settings = {name: value for name, value in request.items() if name not in names}
    settings |= options if isinstance(options, dict) else {}
    settings |= {"numbers": request.get("settings")}
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings.items()
        if value not in (None, False, "")
    )
