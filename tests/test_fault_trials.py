"""A small fixed part of the kills and the failing disks of faults/, and planted faults."""

import contextlib
import os
import random
import signal
import time

import pytest

from faults import forks, kills
from faults.disk import DiskTrials
from faults.disk_failures import PLANTED, FailingSync, PlantedErrors
from faults.forks import Ended
from faults.kills import KillTrials, Moment
from faults.ranks import RankTrials
from faults.tally import Tally, format_causes
from influence_cli.cache import store as store_module
from influence_cli.output import merge as merge_module
from influence_cli.output import tables as tables_module
from influence_cli.storage import atomic, safetensors_io


# ---------------------------------------------------------------- kills
@pytest.fixture(scope="module")
def kill_trials(tmp_path_factory):
    forks.import_package()
    return KillTrials(tmp_path_factory.mktemp("kills"), ["score tracin", "merge"])


def kill_before(trials, name, changes, number=signal.SIGKILL):
    """The tally of trials with a signal before each of these changes of files."""
    tally = Tally("planted")
    for change in changes:
        trials.try_moments(name, 1, [Moment(number, 0.0, change)], tally)
    assert tally.tried == len(changes)
    return tally


def test_killed_commands_lose_nothing(kill_trials):
    """A fixed part of the campaign: one and two processes, each signal."""
    tally, rng = Tally("kills"), random.Random(7)
    for number, change in ((signal.SIGINT, 3), (signal.SIGTERM, 90), (signal.SIGKILL, 160)):
        assert kill_before(kill_trials, "score tracin", [change], number).is_clean
    kill_trials.try_kill("score tracin", 2, rng, tally)
    kill_trials.try_kill("merge", 1, rng, tally)
    assert tally.is_clean, tally.causes


def test_a_planted_loss_after_a_kill_is_counted(kill_trials, monkeypatch):
    write_head = store_module.write_json

    def write_head_first(path, content):  # the order before: cache.json, then .gitignore
        write_head(path, content)
        if path.name == "cache.json":
            path.with_name(".gitignore").unlink()

    monkeypatch.setattr(store_module, "write_json", write_head_first)
    tally = kill_before(kill_trials, "score tracin", [40])
    assert tally.faults["lost"] == 1
    assert "other bytes" in next(iter(tally.causes))


def test_a_planted_leftover_is_counted(kill_trials, monkeypatch):
    monkeypatch.setattr(atomic, "remove_if_stale", lambda path: None)
    tally = kill_before(kill_trials, "score tracin", [120, 130, 140, 150])
    assert list(tally.causes) == ["lost: a temporary file is left"]


def test_a_planted_hang_is_counted_and_its_output_shown(kill_trials, monkeypatch):
    def hang(*_):
        print("a planted hang", flush=True)
        time.sleep(60)

    monkeypatch.setattr(merge_module, "merge_tables", hang)
    monkeypatch.setattr(kills, "PATIENCE", 0.5)
    monkeypatch.setattr(kills, "SLOWER", 0)
    tally = kill_before(kill_trials, "merge", [1])
    assert tally.faults["hang"] == 2  # the signal never came, and the command again
    report = format_causes([tally])
    assert "a planted hang" in report
    assert "in hang" in report  # the stack of the process


def test_a_killed_rank_loses_nothing(tmp_path):
    forks.import_package()
    trials, tally = RankTrials(tmp_path, ["cache"]), Tally("ranks")
    trials.try_rank("cache", random.Random(2), tally)
    assert tally.is_clean, tally.causes


# ---------------------------------------------------------------- disk
ONE_MESSAGE = "note: few steps\nerror: it can't be written: Input/output error: 'file'\n  look\n"


@pytest.fixture(scope="module")
def disk_trials(tmp_path_factory):
    forks.import_package()
    folder = tmp_path_factory.mktemp("disk")
    (folder / "plain").mkdir()
    return DiskTrials(folder, folder / "plain", ["score tracin", "cache"])


def fail_disk(trials, make, times, name="score tracin", seed=3):
    tally, rng = Tally("planted"), random.Random(seed)
    for _ in range(times):
        trials.try_failure(name, make, rng, tally)
    assert tally.tried == times
    return tally


@pytest.mark.parametrize(("text", "faults"), [(ONE_MESSAGE, 0), (ONE_MESSAGE * 2, 1), ("no", 1)])
def test_one_message_is_a_line_that_begins_with_error(text, faults, disk_trials):
    tally, ended = Tally("planted"), Ended(1, text, "", 0.0)
    usual = disk_trials.usual["cache"]
    disk_trials.judge_failed(ended, usual, FailingSync.__new__(FailingSync), tally, "a trial")
    assert tally.faults["traceback"] == faults


@pytest.mark.parametrize("kind", PLANTED)
def test_a_failing_disk_ends_in_one_message_and_the_command_again_succeeds(kind, disk_trials):
    tally = fail_disk(disk_trials, PLANTED[kind], 1)
    assert tally.is_clean, tally.causes


def test_a_planted_silence_on_a_full_disk_is_counted(disk_trials, monkeypatch):
    monkeypatch.setattr(tables_module.TableWriter, "write", lambda *_: None)
    tally = fail_disk(disk_trials, FailingSync, 1)
    assert tally.faults["silent"] + tally.faults["lost"] >= 1


def test_a_planted_half_written_file_is_counted(disk_trials, monkeypatch):
    """A writer without a temporary name."""

    @contextlib.contextmanager
    def write_in_place(path):
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())

    monkeypatch.setattr(safetensors_io, "replace_file", write_in_place)
    tally = fail_disk(disk_trials, PlantedErrors, 8)
    assert tally.faults["lost"] >= 1, tally.causes
