"""A small fixed part of the campaign in faults/: it counts faults, and it finds planted ones."""

import os
import time

from faults import __main__ as campaign
from faults.tally import Tally, format_causes, format_table


def test_a_part_gets_its_count_and_its_share_of_the_time(monkeypatch):
    calls = []

    def run(count, seconds, seed):
        calls.append((count, round(seconds), seed))
        return [Tally("planted", tried=3, target=count)]

    parts = {
        "a": campaign.Part(1, run, 0.5, quick=60, full=1_000),
        "b": campaign.Part(1, run, 0.5, quick=9, full=10),
    }
    monkeypatch.setattr(campaign, "PARTS", parts)
    tallies = campaign.run_parts(["a", "b"], 15, False, 7)["a"]
    assert calls == [(30, 450, 7), (4, 900, 7)]  # "b" gets the time that "a" leaves
    assert "| planted | 3 of 30 |" in format_table(tallies)
    for minutes, full in ((15, True), (240, False)):
        campaign.run_parts(["b", "a"], minutes, full, 0)
        assert [count for count, *_ in calls[-2:]] == [10, 1_000]


def test_a_part_that_fails_is_a_traceback_and_the_others_run(monkeypatch):
    def fail(*_):
        raise RuntimeError("a planted failure")

    def run(*_):
        return [Tally("planted", tried=1)]

    parts = {"a": campaign.Part(1, fail, 1, 1, 1), "b": campaign.Part(1, run, 1, 1, 1)}
    monkeypatch.setattr(campaign, "PARTS", parts)
    broken, planted = campaign.run_lanes(["a", "b"], 1, False, 0)
    assert broken.faults["traceback"] == 1
    assert "a planted failure" in format_causes([broken])
    assert planted.is_clean


def count_in_lane(count, seconds, seed):
    time.sleep(0.3)  # else one process may take both lanes
    return [Tally(f"process {os.getpid()}, {seconds:.0f} s", tried=count)]


def test_two_lanes_run_beside_each_other_and_the_table_has_the_order_of_the_parts(monkeypatch):
    parts = {
        name: campaign.Part(lane, count_in_lane, 1, 30 * place, 1)
        for place, (name, lane) in enumerate({"a": 1, "b": 2, "c": 1}.items(), start=1)
    }
    monkeypatch.setattr(campaign, "PARTS", parts)
    tallies = campaign.run_lanes(["c", "b", "a"], 30, False, 0)
    assert [tally.tried for tally in tallies] == [30, 60, 90]
    first, second, third = (tally.name.split(", ")[0] for tally in tallies)
    assert first == third != second
    assert tallies[1].name.endswith("1800 s")  # all the time of its lane
    assert f"process {os.getpid()}" not in (first, second)


def test_the_table_says_how_it_was_made():
    text = f"before\n{campaign.BEGIN}old\n{campaign.END}\nafter\n"
    how = campaign.describe_run(["--minutes", "40", "--write"], 2400)
    changed = campaign.replace_table(text, how, "| new |")
    assert "`python -m faults --minutes 40 --write` made this table in 40 minutes" in changed
    assert changed.startswith("before\n") and changed.endswith("\nafter\n")
    assert "old" not in changed
    assert campaign.replace_table(changed, how, "| new |") == changed


def test_the_whole_output_of_a_hang_is_shown():
    tally = Tally("planted")
    tally.fault("hang", "score", "score: KILL\n" + "x" * 900)
    assert "score: KILL\n" + "x" * 900 in format_causes([tally])
    assert not tally.is_clean
