"""Mutated and drawn inputs, each through the function that parses it. A file per kind of parser."""

import tempfile
from pathlib import Path

from faults.inputs import definitions, flags, headers, merge_parts, tables, trajectories
from faults.inputs.target import Target, run_target
from faults.tally import Clock, Tally

DRAWN = 0.02  # of the inputs of a kind with a strategy come from hypothesis, at most DRAWN_MOST
DRAWN_LEAST, DRAWN_MOST = 20, 10_000
ROOMS = (headers, trajectories, flags, merge_parts, tables, definitions)


def make_targets(folder: Path) -> list[Target]:
    """All kinds of input. Files are written in `folder`."""
    targets = []
    for room in ROOMS:
        place = folder / room.__name__.rpartition(".")[2]
        place.mkdir()
        targets += room.make_targets(place)
    return targets


def run_inputs(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """About `count` inputs in at most `seconds`; more of those whose parser is fast."""
    clock = Clock(seconds)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        targets = make_targets(Path(name))
        tallies: list[Tally] = []
        weights = sum(target.weight for target in targets)
        for target in targets:
            share = max(1, round(count * target.weight / weights))
            drawn = min(max(DRAWN_LEAST, round(DRAWN * share)), DRAWN_MOST, share // 2)
            tallies.append(run_target(target, share, drawn, clock, seed))
        return tallies
