"""The commands: words and flags only. Each one imports what it needs when it runs, so --help is
fast.
"""

import dataclasses
import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from inspect import Parameter, Signature, getdoc, signature  # `inspect` itself is a command here
from typing import Any, get_args

import typer
from typer.core import TyperGroup

from influence_cli import __version__
from influence_cli.cli.options import NUMBERS, OUT, RANKED, RUN, Debug
from influence_cli.cli.streams import flush_or_discard, open_closed_streams
from influence_cli.cli.user_warnings import warnings_shown_once
from influence_cli.errors import InfluenceError, RankLost, UsageProblem, known_error
from influence_cli.output.visible import write_message
from influence_cli.parallel.ranks import place_of
from influence_cli.signals import Terminated, interruptible


class EscapingGroup(TyperGroup):
    """Shows what a user typed without characters that act on a terminal."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:  # Any: typer's
        with escaped_messages():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:  # Any: typer's
        with escaped_messages():
            return super().invoke(ctx)


@contextmanager
def escaped_messages() -> Iterator[None]:
    """Escapes the message of an error of the command line."""
    try:
        yield
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            from influence_cli.output.visible import LINE_CHARACTERS, escape_controls

            vars(error)["message"] = escape_controls(message, LINE_CHARACTERS)
        raise


app = typer.Typer(
    cls=EscapingGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

# Headings in the order of --help; those of methods and protocols have number 3
HEADING_ORDER = {RUN: 1, RANKED: 2, NUMBERS: 4, OUT: 5}
# command: its module
COMMANDS = {
    "cache": "cache",
    "check": "check",
    "convert": "convert",
    "evaluate": "evaluate",
    "export": "export",
    "init": "init",
    "inspect": "inspect",
    "merge": "merge",
    "methods": "methods",
    "report": "report",
    "score": "score",
    "select": "select",
    "self": "self_influence",
    "trace": "trace",
}


def command(
    name: str, example: str, ranks: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to the command line.

    A parameter whose type is a dataclass of options.py becomes one flag per field. `ranks`: the
    processes of torchrun share the work of this command.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        groups: dict[str, Any] = {}
        parameters: list[Parameter] = []
        for parameter in signature(function).parameters.values():
            if dataclasses.is_dataclass(parameter.annotation):
                groups[parameter.name] = parameter.annotation
                flags = [
                    (field.name, field.default, field.type)
                    for field in dataclasses.fields(parameter.annotation)
                ]
            else:
                flags = [(parameter.name, parameter.default, parameter.annotation)]
            parameters += [
                Parameter(n, Parameter.KEYWORD_ONLY, default=d, annotation=t) for n, d, t in flags
            ]
        debug = Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
        parameters = sorted([*parameters, debug], key=heading_order)

        def run(debug: bool, **flags: Any) -> None:
            for group, kind in groups.items():
                flags[group] = kind(
                    **{field.name: flags.pop(field.name) for field in dataclasses.fields(kind)}
                )
            report_errors(
                lambda: function(**flags) if ranks else run_alone(name, lambda: function(**flags)),
                debug,
            )

        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, epilog=f"Example: {example}", help=help_text(function))(run)
        return function

    return add


def help_text(function: Callable[..., None]) -> str:
    """The docstring with one line per paragraph; the terminal wraps it."""
    return "\n\n".join(" ".join(part.split()) for part in (getdoc(function) or "").split("\n\n"))


def heading_order(parameter: Parameter) -> int:
    """Sort key: arguments, which have no heading, then the flags heading by heading."""
    arguments = get_args(parameter.annotation)
    heading = getattr(arguments[1], "rich_help_panel", None) if arguments else None
    if not isinstance(heading, str):
        return 0
    return HEADING_ORDER.get(heading, 3)


def run_alone(name: str, work: Callable[[], None]) -> None:
    """Run a command whose work ranks can't share. Raises UsageProblem if there are several."""
    count = place_of(os.environ).count
    if count > 1:
        raise UsageProblem(
            f"influence {name} runs as one process, WORLD_SIZE is {count}",
            "start it without torchrun; torchrun can run cache, score, self and evaluate",
        )
    work()


def report_errors(work: Callable[[], None], debug: bool) -> None:
    """Run a command, print its error once, and raise typer.Exit with the exit code.

    stdout is reserved for the table: what other code prints goes to stderr. Rank 0 reports the
    errors of a job; another rank reports only its own.
    """
    try:
        with interruptible(), redirect_stdout(sys.stderr), warnings_shown_once():
            work()
    except BrokenPipeError:  # `| head` has read enough
        flush_or_discard(sys.stdout)
        raise typer.Exit(0) from None
    except (InfluenceError, MemoryError, RuntimeError, OSError) as error:
        known = None if isinstance(error, typer.Exit) else known_error(error)
        if known is None:
            raise
        if debug:
            write_message(traceback.format_exc().rstrip())
        rank = place_of(os.environ).rank
        if not (rank and isinstance(known, RankLost)):
            write_message(f"{f'[rank {rank}] ' if rank else ''}error: {known}")
        flush_or_discard(sys.stdout)
        raise typer.Exit(known.exit_code) from None
    except (KeyboardInterrupt, Terminated) as stop:
        if not place_of(os.environ).rank:
            write_message("interrupted: finished work is kept. Run the same command to resume.")
        raise typer.Exit(143 if isinstance(stop, Terminated) else 130) from None


def version(show: bool) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.callback()
def influence(
    version: bool = typer.Option(
        False, "--version", callback=version, is_eager=True, help="Show the version."
    ),
) -> None:
    """Which training examples made the model predict this, and which worked against it?

    Works on a folder with a definition.py and safetensors checkpoints. Begin with [bold]influence
    init[/bold].
    """


def register(name: str | None = None) -> None:
    """Import a command, which adds itself to `app`. Another name, or None: all commands."""
    modules = [COMMANDS[name]] if name in COMMANDS else COMMANDS.values()
    for module in modules:
        importlib.import_module(f"influence_cli.cli.{module}")


def main() -> None:
    """Run the command line. A stdout that can't be written in the end is an error, too."""
    open_closed_streams()
    register(*sys.argv[1:2])  # the others would cost a tenth of a second
    code: Any = 0  # Any: an int, None or a text
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            write_message(f"error: {error.filename or 'stdout'} can't be written: the disk is full")
        else:
            write_message(traceback.format_exc().rstrip())  # a fault of this package
        flush_or_discard(sys.stdout)
        sys.exit(1)
    unwritten = flush_or_discard(sys.stdout)
    if unwritten is not None and not code and not isinstance(unwritten, BrokenPipeError):
        write_message(f"error: stdout can't be written: {unwritten.strerror}")
        code = 1
    sys.exit(code)
