"""The commands: words and flags only. Each imports what it needs when it runs, so that --help is instant."""

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from types import FrameType
from typing import Any, NoReturn, TypeVar

import typer

from influence_cli import __version__
from influence_cli.errors import InfluenceError, is_out_of_memory

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
Command = TypeVar("Command", bound=Callable[..., Any])


OUT_OF_MEMORY = ("fewer --queries or --layers at once need less; finished units are kept", "--debug shows where it happened")


class Terminated(BaseException):
    """SIGTERM, raised where it came so that temporary files are removed."""


def reporting(command: Command) -> Command:
    """Everything a command can end with, mapped to its message and exit code in one place. stdout is kept for the table."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        def terminate(number: int, frame: FrameType | None) -> NoReturn:
            raise Terminated

        previous = signal.signal(signal.SIGTERM, terminate)
        try:
            with redirect_stdout(sys.stderr):  # what the user's own code prints is talk
                command(*args, **kwargs)
        except (InfluenceError, MemoryError, RuntimeError) as error:
            if isinstance(error, typer.Exit) or not (isinstance(error, InfluenceError) or is_out_of_memory(error)):
                raise
            if kwargs.get("debug"):
                traceback.print_exc()
            known = error if isinstance(error, InfluenceError) else InfluenceError("out of memory", *OUT_OF_MEMORY)
            print(f"error: {known}", file=sys.stderr)
            silence_stdout()
            raise typer.Exit(known.exit_code) from None
        except BrokenPipeError:  # `| head`: the reader has enough
            silence_stdout()
            raise typer.Exit(0) from None
        except (KeyboardInterrupt, Terminated) as stop:
            code = 143 if isinstance(stop, Terminated) else 130
            print("interrupted: finished work is kept; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(code) from None
        finally:
            signal.signal(signal.SIGTERM, previous)

    return wrapped  # type: ignore[return-value]


def silence_stdout() -> None:
    """What is left in stdout's buffer has nowhere to go: let the interpreter's last flush write it to nothing."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def influence(
    version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Show the version."),
) -> None:
    """Which training examples made the model predict this, and which worked against it?

    Works on a folder with a definition.py and safetensors checkpoints. Begin with [bold]influence init[/bold].
    """


def register() -> None:
    """Import the commands, which add themselves to `app`."""
    from influence_cli.cli import cache, init, inspect, score, self_influence  # noqa: F401


def main() -> None:
    register()
    app()
