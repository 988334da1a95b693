"""A small fixed part of the campaign of flips: no flip is silent, and a planted one is found."""

import os
import random

import pytest

from faults.flips import FlipTrials, run_flips, run_kind
from faults.flips.kinds import KINDS
from faults.tally import Tally
from influence_cli.storage import checksums

FEW = (
    "int8",
    "small files of the cache",
    "recorded trajectory",
    "results of evaluate",
    "checkpoints without checksums",
)


@pytest.mark.parametrize("name", FEW)
def test_a_flipped_bit_is_noticed_or_harmless(name):
    tally = run_kind(name, count=6, stride=600, seconds=60, seed=3)
    assert tally.tried == tally.target >= 6
    assert tally.refused > 0.7 * tally.tried
    assert tally.is_clean, tally.causes


def test_a_flip_that_no_checksum_finds_is_silent(tmp_path, monkeypatch):
    kind = next(kind for kind in KINDS if kind.name == "scales of int8")
    trials = FlipTrials(kind, tmp_path, random.Random(0))
    tally = Tally("planted")
    monkeypatch.setattr(checksums, "compare_checksums", lambda tensors, sums: None)
    for _ in range(6):
        trials.flip(trials.body(), tally)
    assert tally.faults["silent"] >= 1
    assert tally.tried == 6


def test_a_process_that_dies_is_a_fault_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr("faults.flips.KINDS", KINDS[:3])
    monkeypatch.setattr("faults.flips.run_kind", die_at_float16)
    tallies = run_flips(2, 60)
    assert [tally.faults["traceback"] for tally in tallies] == [0, 1, 0]


def die_at_float16(name: str, *rest: object) -> Tally:
    if name == "float16":
        os._exit(3)
    return Tally(f"flips: {name}")


def test_kinds_run_side_by_side(monkeypatch):
    monkeypatch.setattr("faults.flips.KINDS", KINDS[:2])
    tallies = run_flips(2, 60)
    assert [tally.name for tally in tallies] == ["flips: float32", "flips: float16"]
    assert all(tally.tried >= 1 and tally.is_clean for tally in tallies)
