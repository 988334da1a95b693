"""Writes docs/commands.md from the commands themselves: python docs/generate.py. A test checks that it is up to date."""

from pathlib import Path

import typer

from influence_cli.cli import app, register

HEAD = """# Commands

Written by `python docs/generate.py` from the commands themselves. Exit codes: 0 done; 1 the run or the cache has a problem; 2 the
command line has; 130 or 143 interrupted, and resumable. stdout carries the table and nothing else.
"""


def plain(text: str) -> str:
    """Help as one line, without the escapes of rich's markup."""
    return " ".join(text.split()).replace("\\[", "[")


def reference() -> str:
    register()
    group = typer.main.get_command(app)
    parts = [HEAD]
    for name, command in sorted(group.commands.items()):  # type: ignore[attr-defined]
        parts.append(
            f"\n## influence {name}\n\n{' '.join((command.help or '').split())}\n\n```\n{command.epilog.removeprefix('Example: ')}\n```\n"
        )
        panel = ""
        for parameter in command.params:
            heading = getattr(parameter, "rich_help_panel", None) or "Options"
            if heading != panel:
                panel = heading
                parts.append(f"\n{panel}:\n\n")
            names = ", ".join(parameter.opts) if parameter.opts[0].startswith("-") else ""
            shown = " ".join(
                part
                for part in (
                    names,
                    parameter.metavar if not getattr(parameter, "is_flag", False) else "",
                )
                if part
            )
            parts.append(f"- `{shown}` {plain(parameter.help or '')}\n")
    return "".join(parts)


if __name__ == "__main__":
    (Path(__file__).parent / "commands.md").write_text(reference(), encoding="utf-8")
