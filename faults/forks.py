"""Runs the command line in forked processes: torch is imported once, a trial takes milliseconds."""

import importlib
import os
import pkgutil
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_model

import influence_cli
from influence_cli import cli
from influence_cli.signals import exit_at_once, handle_signals

PATIENCE = 20.0  # seconds after which a process hangs
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
    torch.set_num_threads(1)
    cli.register()


def build_run(folder: Path, steps: Sequence[int] = (10, 20, 30)) -> Path:
    """A small run: random weights, a rate of 0.1."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(DEFINITION)
    space: dict = {"__name__": "definition_of_the_campaign"}
    exec(DEFINITION, space)
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


class ForkedCommand:
    """`influence ARGUMENTS` in a fork of this process, in the folder `place`."""

    def __init__(self, arguments: Sequence[str], place: Path, name: str = "0") -> None:
        self.err = place / f"err-{name}"
        self.start = time.monotonic()
        sys.stdout.flush()
        self.id = os.fork()
        if not self.id:
            run_in_fork(arguments, place, place / f"out-{name}", self.err)

    def kill(self, number: int) -> None:
        os.kill(self.id, number)  # not yet waited for, so the id is still ours

    def wait(self) -> Ended:
        while time.monotonic() - self.start < PATIENCE:
            ended, status = os.waitpid(self.id, os.WNOHANG)
            if ended:
                return Ended(
                    os.waitstatus_to_exitcode(status), self.err.read_text("utf-8", "replace")
                )
            time.sleep(0.002)
        self.kill(signal.SIGKILL)
        os.waitpid(self.id, 0)
        return Ended(None, self.err.read_text("utf-8", "replace"))


def run_in_fork(arguments: Sequence[str], place: Path, out: Path, err: Path) -> None:
    """The child: never returns."""
    code = 1
    try:
        for path, number in ((Path(os.devnull), 0), (out, 1), (err, 2)):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags, 0o666), number)
        os.chdir(place)
        handle_signals(exit_at_once)  # as __main__.py does
        sys.argv = ["influence", *arguments]
        cli.app()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 1
        os._exit(code)


def run_command(arguments: Sequence[str], place: Path) -> Ended:
    return ForkedCommand(arguments, place).wait()


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
