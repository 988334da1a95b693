"""A small fixed part of the campaign in faults/: it counts faults, and it finds planted ones."""

import random

import pytest

from faults import __main__ as campaign
from faults.inputs import SilentFault, Target, run_inputs, try_input
from faults.tally import Tally, format_causes, format_table
from influence_cli.errors import UsageProblem

# rows of the table that are clean now; add one when its last fault is fixed
CLEAN = (
    "trajectory header",
    "index file",
    "losses of a definition",
    "merge part",
    "texts to a terminal",
)


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [(SilentFault("x"), "silent"), (KeyError("x"), "traceback"), (UsageProblem("x"), None)],
)
def test_an_outcome_is_counted_by_its_kind(error, kind):
    tally = Tally("planted")
    target = Target("planted", lambda rng: 0, raise_error)
    try_input(target, error, tally)
    assert tally.tried == 1
    assert {name for name, count in tally.faults.items() if count} == ({kind} if kind else set())
    assert tally.is_clean == (kind is None)


def test_mutated_inputs_meet_no_fault():
    tallies = {tally.name: tally for tally in run_inputs(20_000, 8)}
    for name in CLEAN:
        tally = tallies[f"inputs: {name}"]
        assert tally.tried > 20
        assert tally.is_clean, tally.causes
    assert format_table(tallies.values()).count("\n") == len(tallies) + 1


def test_a_seed_gives_the_same_inputs_again():
    from faults.inputs import LINE
    from faults.mutate import mutate_bytes

    one, two = (
        [mutate_bytes(LINE, rng) for _ in range(200)]
        for rng in (random.Random(3), random.Random(3))
    )
    assert one == two
    assert len(set(one)) > 100


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
