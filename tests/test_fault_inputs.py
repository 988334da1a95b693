"""A small fixed part of the campaign of inputs: no fault, and planted ones are found."""

import itertools
import random
import time

import pytest

from faults import inputs
from faults.inputs import commands, make_targets, run_inputs
from faults.inputs import target as targets
from faults.inputs.commands import CommandTrials, judge_end
from faults.inputs.definition_texts import Written, judge_definition
from faults.inputs.target import CommandFault, Refused, SilentFault, Target, run_target, try_input
from faults.session import Outcome
from faults.tally import Clock, Tally, format_table
from influence_cli.api import specs
from influence_cli.errors import UsageProblem


def raise_error(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [(SilentFault("x"), "silent"), (KeyError("x"), "traceback"), (UsageProblem("x"), None)],
)
def test_an_outcome_is_counted_by_its_kind(error, kind):
    tally = Tally("planted")
    target = Target("planted", lambda rng: 0, raise_error, 1)
    try_input(target, error, tally)
    assert tally.tried == 1
    assert {name for name, count in tally.faults.items() if count} == ({kind} if kind else set())
    assert tally.is_clean == (kind is None)


def test_an_input_that_takes_too_long_is_a_hang(monkeypatch):
    monkeypatch.setattr(targets, "GIVE_UP", 0.1)
    tally = Tally("planted")
    try_input(Target("planted", lambda rng: 0, lambda value: time.sleep(60), 1), 0, tally)
    assert tally.faults["hang"] == tally.tried == 1


def test_mutated_and_drawn_inputs_meet_no_fault(monkeypatch):
    monkeypatch.setattr(inputs, "DRAWN_LEAST", 4)
    tallies = run_inputs(500, 60)
    for tally in tallies:
        assert tally.tried >= 1, tally.name
        assert tally.is_clean, tally.causes
    assert sum(tally.tried for tally in tallies) >= 450
    assert format_table(tallies).count("\n") == len(tallies) + 1


def test_extreme_inputs_end_in_one_message_within_two_seconds(tmp_path):
    for target in make_targets(tmp_path):
        tally = Tally(target.name)
        for value in itertools.islice(target.extremes(), 0, None, 13):
            try_input(target, value, tally)
        assert tally.is_clean, tally.causes


def test_a_parser_that_is_too_lenient_is_found(tmp_path, monkeypatch):
    """The oracle of ids finds a reader that takes each id for the next one."""
    read = specs.ids
    monkeypatch.setattr(specs, "ids", lambda *given: [index + 1 for index in read(*given)])
    (target,) = (target for target in make_targets(tmp_path) if target.name == "spec of ids")
    assert run_target(target, 200, 20, Clock(60), 0).faults["silent"] > 10


def test_a_seed_gives_the_same_inputs_again():
    from faults.inputs.trajectories import LINE
    from faults.mutate import mutate_bytes

    one, two = (
        [mutate_bytes(LINE, rng) for _ in range(200)]
        for rng in (random.Random(3), random.Random(3))
    )
    assert one == two
    assert len(set(one)) > 100


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> CommandTrials:
    return CommandTrials.open(tmp_path_factory.mktemp("commands"))


def test_a_command_with_a_wrong_table_is_silent(trials):
    rows = trials.run(*commands.SCORE, "--lr", "0.5")
    trials.expect_scores(rows, dict.fromkeys(commands.STEPS, 0.5))
    with pytest.raises(SilentFault, match="another score"):
        trials.expect_scores(rows, dict.fromkeys(commands.STEPS, 0.4))
    with pytest.raises(SilentFault, match="rows"):
        trials.expect_scores(rows[1:], dict.fromkeys(commands.STEPS, 0.5))
    for drawn in (Written("", False, None), Written("", True, "another label")):
        with pytest.raises(SilentFault):
            judge_definition(drawn, rows)


@pytest.mark.parametrize(
    ("outcome", "kind"),
    [
        (Outcome(1, "Traceback (most recent call last)\nKeyError"), CommandFault),
        (Outcome(None, ""), CommandFault),
        (Outcome(-9, ""), CommandFault),
        (Outcome(1, ""), CommandFault),
        (Outcome(1, "error: a\nerror: b"), CommandFault),
        (Outcome(2, "error: \x1b[31m"), SilentFault),
        (Outcome(0, "error: a"), SilentFault),
        (Outcome(2, "note: a\nerror: b\n  c"), Refused),
    ],
)
def test_an_end_of_a_command_is_judged(outcome, kind):
    with pytest.raises(kind):
        judge_end(outcome)
