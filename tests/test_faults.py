"""A small fixed part of the campaign in faults/: it counts faults, and it finds planted ones."""

from faults import __main__ as campaign
from faults.tally import Tally, format_causes, format_table


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
