"""SIGINT and SIGTERM: 130 and 143, no stack trace, at any moment."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.training import train

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
COMMAND = [sys.executable, "-m", "influence_cli"]


def start(*flags, **options):
    return subprocess.Popen(
        [*COMMAND, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", CODES, ids=str)
@pytest.mark.parametrize("seconds", [0.1, 0.25, 0.5, 1.0])
def test_a_signal_while_a_command_starts(number, seconds, tmp_path):
    train(tmp_path / "run", steps=2)
    process = start("score", tmp_path / "run", "--cache", "none")
    time.sleep(seconds)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "/influence_cli/cli/" not in err  # no stack trace through a command
    if "Traceback" not in err:  # else Python was still starting, or importing errors.py
        assert process.returncode in (CODES[number], -number, 0), err  # -number: before Python


SLOW = """
from pathlib import Path
import time
import torch

class Slow(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i):
        Path(__file__).with_name("reached").touch()
        try:
            time.sleep(30)
        finally:
            time.sleep({after})
        return torch.zeros(2)

def model(): return torch.nn.Linear(2, 1)
def train_data(): return Slow()
def query_data(): return Slow()
def loss(model, batch): return model(batch)[:, 0]
"""


@pytest.fixture
def slow_run(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "definition.py").write_text(SLOW.format(after=3))
    save_file(
        {"weight": torch_zeros(1, 2), "bias": torch_zeros(1)},
        tmp_path / "checkpoints" / "step-1.safetensors",
        {"learning_rate": "0.1"},
    )
    return tmp_path


def torch_zeros(*shape):
    import torch

    return torch.zeros(*shape)


def reach(run):
    end = time.monotonic() + 60
    while not (run / "reached").exists():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("second", CODES, ids=str)
def test_a_second_signal_ends_at_once(second, slow_run):
    process = start("score", slow_run)
    reach(slow_run)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)  # the first signal waits for the user's own cleanup
    assert process.poll() is None
    process.send_signal(second)
    _, err = process.communicate(timeout=2)
    assert process.returncode == CODES[second]
    assert "Traceback" not in err


def test_a_signal_that_the_shell_ignores_stays_ignored(slow_run):
    process = start(
        "score", slow_run, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    )
    reach(slow_run)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


IN_FINALIZER = """
import signal, sys, time
from influence_cli.cli import report_errors

class Scratch:
    def __del__(self):
        signal.raise_signal(signal.{name})

def work():
    scratch = Scratch()
    del scratch
    time.sleep(20)

import typer
try:
    report_errors(work, False)
except typer.Exit as ended:
    sys.exit(ended.exit_code)
"""


@pytest.mark.parametrize("number", CODES, ids=str)
def test_a_signal_while_a_finalizer_runs_is_not_lost(number):
    program = IN_FINALIZER.format(name=number.name)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == CODES[number]
    assert ended.stderr.startswith("interrupted: ")
    assert "Traceback" not in ended.stderr
