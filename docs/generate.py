"""Writes docs/commands.md from the commands, and docs/python.md from docstrings: python docs/generate.py.

A test checks that both are up to date.
"""

import inspect
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperArgument, TyperOption

from influence_cli.api.influence_run import InfluenceRun, open_run
from influence_cli.api.score_tables import RankedTable, Scores
from influence_cli.cli import app, register

Parameter = TyperArgument | TyperOption

HEAD = """# Commands

`python docs/generate.py` writes this page from the commands themselves. Exit codes: 0 done; 1 the run or the cache has a problem; 2 the
command line has; 130 or 143 interrupted, and resumable. stdout carries the table and nothing else. Flags that several commands have are
described once, under [Shared flags](#shared-flags).
"""
SHARED = "\n## Shared flags\n"
PYTHON_HEAD = """# Python API

`python docs/generate.py` writes this page from the docstrings. The [tutorial](tutorial.md) shows the API at work.

```python
from influence_cli import open_run

run = open_run("my_run")
scores = run.score(method="tracin", queries=[57], top=10)
```

- Arguments have the names, the values and the defaults of the [flags](commands.md): `--lr-weights none` is `lr_weights="none"`.
- Every mistake is an `InfluenceError` of `influence_cli.errors`, with the message of the command line.
- A call prints nothing. `open_run(..., progress=True)` writes progress and notes to stderr; `notes` of a table has the notes of its call.
- A program is one process with one call at a time. Only the command line shares work between the processes of torchrun.
- A definition of a Hugging Face run sets `HF_HUB_OFFLINE=1`. Import `transformers` first where the same program downloads models.
"""


def plain(text: str) -> str:
    """Help as one line, without the escapes of rich's markup."""
    return " ".join(text.split()).replace("\\[", "[")


def flag_of(parameter: Parameter) -> str:
    """`-o, --output FILE`; the name alone for an argument."""
    names = ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else ""
    value = "" if getattr(parameter, "is_flag", False) else str(parameter.metavar or "")
    return " ".join(filter(None, (names, value)))


def name_of(parameter: Parameter) -> str:
    """`--output`; the name alone for an argument."""
    return parameter.opts[-1] if parameter.opts[0].startswith("-") else str(parameter.metavar)


def describe(parameter: Parameter) -> str:
    text = plain(parameter.help or "")
    default = parameter.default
    if default is not None and default is not False and "[default" not in text:
        text += f" [default: {default}]"
    return f"- `{flag_of(parameter)}` {text}\n"


def heading_of(parameter: Parameter) -> str:
    return getattr(parameter, "rich_help_panel", None) or (
        "Options" if parameter.opts[0].startswith("-") else "Arguments"
    )


def list_by_heading(parameters: list[Parameter]) -> str:
    """The parameters under their headings, in the order of the first of each."""
    headings = dict.fromkeys(map(heading_of, parameters))
    return "".join(
        f"\n{heading}:\n\n" + "".join(describe(p) for p in parameters if heading_of(p) == heading)
        for heading in headings
    )


def reference() -> str:
    register()
    commands = sorted(typer.main.get_command(app).commands.items())  # type: ignore[attr-defined]
    counts = Counter(describe(p) for _, command in commands for p in command.params)
    shared: dict[str, Parameter] = {}
    parts = [HEAD]
    for name, command in commands:
        example = command.epilog.removeprefix("Example: ")
        parts.append(f"\n## influence {name}\n\n{plain(command.help)}\n\n```\n{example}\n```\n")
        parts.append(list_by_heading([p for p in command.params if counts[describe(p)] == 1]))
        others = [p for p in command.params if counts[describe(p)] > 1]
        shared |= {describe(p): p for p in others}
        parts.append(f"\nShared flags: {', '.join(f'`{name_of(p)}`' for p in others)}\n")
    return "".join([*parts, SHARED, list_by_heading(list(shared.values()))])


def describe_member(name: str, member: Any) -> str:
    """Heading, signature with a line for each argument, and docstring."""
    text = inspect.getdoc(member) or ""
    if isinstance(member, property) or not callable(member):
        return f"\n### {name}\n\n{text}\n"
    signature = inspect.signature(member)
    parameters = [
        p.replace(annotation=p.empty) for p in signature.parameters.values() if p.name != "self"
    ]
    call = f"{name.rpartition('.')[2]}{inspect.Signature(parameters)}"
    shown = textwrap.fill(call, 100, subsequent_indent="    ", break_on_hyphens=False)
    return f"\n### {name}\n\n```\n{shown}\n```\n\n{text}\n"


def python_reference() -> str:
    parts = [PYTHON_HEAD, "\n## Open a run\n", describe_member("open_run", open_run)]
    for kind in (InfluenceRun, Scores, RankedTable):
        parts.append(f"\n## {kind.__name__}\n\n{inspect.getdoc(kind)}\n")
        members = {
            name: member
            for name, member in vars(kind).items()
            if not name.startswith("_") and inspect.getdoc(member)
        }
        parts += [
            describe_member(f"{kind.__name__}.{name}", member) for name, member in members.items()
        ]
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(reference(), encoding="utf-8")
    (Path(__file__).parent / "python.md").write_text(python_reference(), encoding="utf-8")
