"""Runs commands in this process, one after the other, on a folder that is restored in between."""

import io
import os
import shutil
import traceback
from collections.abc import Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer

from faults.time_limit import Stopped, time_limit
from influence_cli import cli

PATIENCE = 30.0  # seconds after which a command hangs


@dataclass(frozen=True)
class Outcome:
    """`code`: the exit code; None: it was stopped. `err`: stdout and stderr."""

    code: int | None
    err: str

    @property
    def notes(self) -> set[str]:
        return {line for line in self.err.splitlines() if line.startswith("note: ")}

    @property
    def has_fault(self) -> bool:
        return self.code is None or "Traceback" in self.err


@cache
def command_line() -> Any:  # Any: click's command; typer builds it anew at each call of cli.app
    return typer.main.get_command(cli.app)


def run_inside(arguments: Sequence[str], place: Path) -> Outcome:
    """`influence ARGUMENTS` in this process, in the folder `place`."""
    err, code = io.StringIO(), 0
    with chdir(place), redirect_stdout(err), redirect_stderr(err):
        try:
            with time_limit(PATIENCE):
                command_line().main(list(arguments), prog_name="influence")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except Stopped:
            return Outcome(None, err.getvalue())
        except Exception:
            traceback.print_exc(file=err)
            code = 1
    return Outcome(code, err.getvalue())


class Snapshot:
    """The files of a folder, to be restored after a command or a flip changed some of them."""

    def __init__(self, place: Path, copy: Path) -> None:
        self.place, self.copy = place, copy
        shutil.copytree(place, copy)
        self.states = self._read_states()

    def restore(self) -> None:
        states = self._read_states()
        for name in states.keys() - self.states.keys():
            (self.place / name).unlink()
        for name, state in self.states.items():
            if states.get(name) != state:
                path = self.place / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.copy / name, path)
                self.states[name] = describe_state(path)

    def _read_states(self) -> dict[str, tuple[int, ...]]:
        """Size, inode and time of each file: a file that was written or replaced has others."""
        return {
            os.path.relpath(os.path.join(folder, name), self.place): describe_state(
                Path(folder, name)
            )
            for folder, _, names in os.walk(self.place)
            for name in names
        }


def describe_state(path: Path) -> tuple[int, ...]:
    state = path.stat()
    return state.st_size, state.st_ino, state.st_mtime_ns
