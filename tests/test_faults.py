"""A small fixed part of the campaign in faults/: it counts faults, and it finds planted ones."""

import random
import signal
import time

import pytest

from faults import __main__ as campaign
from faults import forks, kills
from faults.kills import KillTrials, Moment
from faults.tally import Tally, format_causes, format_table
from influence_cli.cache import store as store_module
from influence_cli.output import merge as merge_module
from influence_cli.storage import atomic


def test_a_part_gets_its_count_and_its_share_of_the_time(monkeypatch):
    calls = []

    def run(count, seconds, seed):
        calls.append((count, round(seconds), seed))
        return [Tally("planted", tried=3, target=count)]

    parts = {
        "a": campaign.Part(run, 0.5, quick=60, full=1_000),
        "b": campaign.Part(run, 0.5, quick=9, full=10),
    }
    monkeypatch.setattr(campaign, "PARTS", parts)
    tallies = campaign.run_parts(["a", "b"], 15, False, 7)
    assert calls == [(30, 450, 7), (4, 900, 7)]  # "b" gets the time that "a" leaves
    assert "| planted | 3 of 30 |" in format_table(tallies)
    for minutes, full in ((15, True), (240, False)):
        campaign.run_parts(["b", "a"], minutes, full, 0)
        assert [count for count, *_ in calls[-2:]] == [10, 1_000]


def test_the_whole_output_of_a_hang_is_shown():
    tally = Tally("planted")
    tally.fault("hang", "score", "score: KILL\n" + "x" * 900)
    assert "score: KILL\n" + "x" * 900 in format_causes([tally])
    assert not tally.is_clean


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
    tally = kill_before(kill_trials, "score tracin", [160])
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
