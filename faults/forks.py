"""Runs the command line in forked processes: torch is imported once, a trial takes milliseconds."""

import contextlib
import faulthandler
import gc
import importlib
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_model

import influence_cli
from influence_cli import cli
from influence_cli.signals import exit_at_once, handle_signals

PATIENCE = 60.0  # seconds after which a process hangs; other processes may share the cores
STACKS = signal.SIGUSR1  # makes a fork print the stacks of its threads
DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 40)

def query_data():
    return examples(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def label(example):
    return "abc"[int(example[1])]
"""


def import_package() -> None:
    """Import every module of the package before the first fork."""
    for module in pkgutil.walk_packages(influence_cli.__path__, "influence_cli."):
        if "templates" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("torch._dynamo", "torch.optim"):  # an optimizer imports it at its first step
        importlib.import_module(name)
    torch.set_num_threads(1)
    cli.register()
    gc.freeze()  # so that a fork collects only its own garbage


def build_run(
    folder: Path, steps: Sequence[int] = (10, 20, 30), definition: str = DEFINITION
) -> Path:
    """A small run: random weights, a rate of 0.1."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(definition)
    space: dict = {"__name__": "definition_of_the_campaign"}
    exec(definition, space)
    for step in steps:
        torch.manual_seed(step)
        path = folder / "checkpoints" / f"step-{step:06d}.safetensors"
        save_model(space["model"](), str(path), {"step": str(step), "learning_rate": "0.1"})
    return folder


@dataclass(frozen=True)
class Ended:
    """A process that ended. `code` as a shell gives it, but -N for a signal; None: it hung."""

    code: int | None
    err: str
    out: str = ""
    seconds: float = 0.0

    @property
    def output(self) -> str:
        return f"exit {self.code} after {self.seconds:.1f} s\n{self.out}{self.err}"


class ForkedCommand:
    """`influence ARGUMENTS` in a fork of this process, in the folder `place`. `main`: instead.

    `prepare` runs in the fork before the command. `environment`: variables to set there. `logs`:
    the folder that takes its stdout and stderr, `place` by default.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        place: Path,
        name: str = "0",
        prepare: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
        logs: Path | None = None,
        main: Callable[[], object] = lambda: cli.app(),
    ) -> None:
        self.out, self.err = (logs or place) / f"out-{name}", (logs or place) / f"err-{name}"
        self.start = time.monotonic()
        sys.stdout.flush()
        self.id = os.fork()
        if not self.id:
            os.environ.update(environment or {})
            sys.argv = ["influence", *arguments]
            run_in_fork(place, (self.out, self.err), prepare or (lambda: None), main)

    def kill(self, number: int) -> None:
        os.kill(self.id, number)  # not yet waited for, so the id is still ours

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Waits for the end. A process that hangs prints its stacks, and is killed."""
        while time.monotonic() - self.start < patience:
            if (ended := self.poll()) is not None:
                return ended
            time.sleep(0.002)
        self.kill(STACKS)
        time.sleep(0.5)
        self.kill(signal.SIGKILL)
        os.waitpid(self.id, 0)
        return self._describe(None)

    def poll(self) -> Ended | None:
        """The end, if it has come."""
        ended, status = os.waitpid(self.id, os.WNOHANG)
        return self._describe(os.waitstatus_to_exitcode(status)) if ended else None

    def _describe(self, code: int | None) -> Ended:
        texts = [
            path.read_text("utf-8", "replace") if path.exists() else ""
            for path in (self.err, self.out)
        ]
        return Ended(code, texts[0], texts[1], time.monotonic() - self.start)


def run_in_fork(
    place: Path,
    files: tuple[Path, Path],
    prepare: Callable[[], None],
    main: Callable[[], object],
) -> None:
    """The child: never returns. `files`: take its stdout and stderr."""
    code = 1
    try:
        open_streams(files)
        faulthandler.register(STACKS, sys.stderr)
        with contextlib.suppress(OSError):  # the disk is read-only
            (place / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(place / "tmp")
        os.chdir(place)
        handle_signals(exit_at_once)  # as __main__.py does
        prepare()
        main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        gc.collect()  # what a failed command kept alive: scratch folders
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)


def open_streams(files: tuple[Path, Path]) -> None:
    """New streams in the child: those of the parent may be replaced, as pytest does."""
    for number, path in enumerate((Path(os.devnull), *files)):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        opened = os.open(path, flags, 0o666)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)  # type: ignore[misc]
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = os.fdopen(  # type: ignore[misc]
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )


def run_command(
    arguments: Sequence[str], place: Path, prepare: Callable[[], None] | None = None
) -> Ended:
    return ForkedCommand(arguments, place, prepare=prepare).wait()


def copy_folder(source: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


def read_files(folder: Path) -> dict[str, bytes]:
    """Each file below the folder, by its relative name; not the memory of checkpoint digests,
    which holds inodes and time stamps."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "checkpoints.json"
    }
