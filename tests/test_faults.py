"""A small fixed part of the campaign in faults/: it counts faults, and it finds planted ones."""

import random

import pytest

from faults.inputs import SilentFault, Target, run_inputs, try_input
from faults.tally import Tally, format_table
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
