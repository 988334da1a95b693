"""Run folders made from a few lines, and the command line called in this process with stdout and stderr kept apart."""

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the tests run side by side; before torch is imported

import torch
import typer
from hypothesis import settings
from safetensors.torch import save_model

from influence_cli import cli
from influence_cli.cache import store
from influence_cli.extraction import memory_budget
from tests.browser.requirements import find_lack

cli.register()

# tests do not time: a busy machine is no failure
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F


def model():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(torch.randn(number, 4, generator=generator), torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 20)

def query_data():
    return examples(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def label(example):
    return "abc"[int(example[1])]
"""


@cache
def build_command() -> Any:  # Any: click's command
    """Once a process: cli.app builds all commands in each call, a quarter of the time of the tests."""
    return typer.main.get_command(cli.app)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[dict[str, str]]:
        import csv

        return list(csv.DictReader(io.StringIO(self.out)))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:  # Any: pytest's
    if config.args_source is config.ArgsSource.TESTPATHS and (lack := find_lack()):
        terminalreporter.write_line(f"tests/browser is left out: no {lack}. make browser runs it")


@pytest.fixture(autouse=True)
def same_units(monkeypatch) -> None:
    """Every test starts with the shipped size of units, whatever a definition loaded before did."""
    monkeypatch.setattr(memory_budget, "UNIT_EXAMPLES", store.UNIT_EXAMPLES)


@pytest.fixture
def influence(capfd, monkeypatch) -> Callable[..., Result]:
    """influence("score", run, "--top", "3") -> Result; exactly what a shell would see."""

    def call(*args: object, stdin: str | None = None) -> Result:
        capfd.readouterr()
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            build_command()([str(arg) for arg in args], prog_name="influence")
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return call


def build_run(
    folder: Path,
    definition: str = DEFINITION,
    steps: tuple[int, ...] = (10, 20),
    model: Callable[[], torch.nn.Module] | None = None,
) -> Path:
    """A run folder: definition.py and checkpoints of the steps given (random weights, rates 0.1, 0.05, ...)."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(definition)
    if model is None:
        space: dict = {
            "__file__": str(folder / "definition.py"),
            "__name__": "definition_of_a_test",
        }
        exec(compile(definition, "definition.py", "exec"), space)
        model = space["model"]
    for k, step in enumerate(steps):
        torch.manual_seed(step)
        metadata = {"step": str(step), "learning_rate": str(0.1 / (1 + k))}
        save_model(
            model(), str(folder / "checkpoints" / f"step-{step:06d}.safetensors"), metadata=metadata
        )
    return folder


@pytest.fixture
def make_run(tmp_path) -> Callable[..., Path]:
    """make_run() -> a run folder in the test's own place; make_run(name, definition, steps, model)."""

    def make(name: str = "run", *args: Any, **options: Any) -> Path:
        return build_run(tmp_path / name, *args, **options)

    return make
