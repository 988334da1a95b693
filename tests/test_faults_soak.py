"""A few rounds of the soak in faults/, and growth of each kind, planted."""

import mmap
import os
import sys
import tempfile
import threading
import time

import pytest
import torch

from faults import soak
from faults.soak import MEMORY, find_growth, run_soak
from influence_cli import cli

COMMANDS = (("score", "run", "--lr", "0.1", "-o", "table.csv"), ("methods", "--no-such-flag"))
CODES = {COMMANDS[1]: 2}
KEPT: list[object] = []  # what planted leaks hold


@pytest.fixture
def short_soak(monkeypatch):
    """short_soak(): six rounds of two commands."""
    monkeypatch.setattr(soak, "ROUND", COMMANDS)
    monkeypatch.setattr(soak, "SLOW", ())
    monkeypatch.setattr(soak, "CODES", CODES)
    monkeypatch.setattr(soak, "Clock", SixRounds)
    threads = torch.get_num_threads()
    yield lambda: run_soak(1, 1.0)
    torch.set_num_threads(threads)


class SixRounds:
    def __init__(self, seconds):
        self.rounds, self.seconds = 0, seconds

    @property
    def is_over(self):
        self.rounds += 1
        return self.rounds > 6


def test_a_short_soak_is_flat(short_soak):
    one_process, forks = short_soak()
    assert one_process.tried == forks.tried == 12
    assert one_process.is_clean, one_process.causes
    assert forks.is_clean, forks.causes


def leave_a_descriptor():
    os.dup(1)


def leave_a_thread():
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def leave_memory():
    """New pages, which are written: malloc may give freed memory that is resident already."""
    pages = mmap.mmap(-1, 2 * MEMORY)
    for first in range(0, len(pages), mmap.PAGESIZE):
        pages[first] = 1
    KEPT.append(pages)


def leave_a_file():
    tempfile.NamedTemporaryFile(prefix="x.tmp-", dir="run", delete=False).close()


@pytest.mark.parametrize(
    ("leak", "growth", "in_forks"),
    [
        (leave_a_descriptor, "open descriptors grow", False),
        (leave_a_thread, "threads grow", False),
        (leave_memory, "resident memory grow", False),
        (leave_a_file, "temporary files grow", True),
    ],
)
def test_planted_growth_is_counted(leak, growth, in_forks, short_soak, monkeypatch):
    def leak_and_end():
        leak()
        raise SystemExit(CODES.get(tuple(sys.argv[1:]), 0))

    monkeypatch.setattr(cli, "app", leak_and_end)
    one_process, forks = short_soak()
    assert any(growth in cause for cause in one_process.causes), one_process.causes
    assert any(growth in cause for cause in forks.causes) == in_forks


def test_a_command_that_ends_in_another_way_is_counted(short_soak, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: 1 / 0)
    one_process, forks = short_soak()
    assert list(one_process.causes) == ["traceback: ZeroDivisionError: division by zero"]
    assert one_process.faults["traceback"] == forks.faults["traceback"] == 12


def test_a_process_that_dies_is_counted(short_soak, monkeypatch):
    monkeypatch.setattr(soak, "run_here", lambda arguments: os._exit(0))
    one_process, _ = short_soak()
    assert list(one_process.causes) == ["traceback: the process died"]


@pytest.mark.parametrize(
    ("values", "grows"),
    [([5, 9, 9, 9, 9, 9], False), ([1, 1, 2, 2, 2, 3], True), ([1, 1, 3, 2, 2, 2], False)],
)
def test_the_last_third_is_compared_with_the_middle_one(values, grows):
    assert bool(find_growth([{"files": value} for value in values])) == grows
