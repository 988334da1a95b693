"""Mutated and drawn inputs, each through the function that parses it. A file per kind of parser."""

import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from faults.forks import import_package
from faults.inputs import commands, definitions, flags, headers, merge_parts, tables, trajectories
from faults.inputs.target import Target, run_target
from faults.tally import Clock, Tally

DRAWN = 0.02  # of the inputs of a kind with a strategy come from hypothesis, at most DRAWN_MOST
DRAWN_LEAST, DRAWN_MOST = 20, 10_000
ROOMS = (headers, trajectories, flags, merge_parts, tables, definitions)
COMMANDS = 0.002  # of the inputs go through the command line, in a process of their own
COMMANDS_TIME = 0.4  # the share of the time that these may take


def make_targets(folder: Path) -> list[Target]:
    """The kinds of input that a function parses. Files are written in `folder`."""
    targets = []
    for room in ROOMS:
        place = folder / room.__name__.rpartition(".")[2]
        place.mkdir()
        targets += room.make_targets(place)
    return targets


@contextmanager
def scratch_folder() -> Iterator[Path]:
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


def run_targets(
    make: Callable[[Path], list[Target]], count: int, seconds: float, seed: int
) -> list[Tally]:
    """`count` inputs, divided by the weights of the kinds."""
    clock = Clock(seconds)
    tallies: list[Tally] = []
    with scratch_folder() as folder:
        targets = make(folder)
        weights = sum(target.weight for target in targets)
        for target in targets:
            share = max(1, round(count * target.weight / weights))
            drawn = min(max(DRAWN_LEAST, round(DRAWN * share)), DRAWN_MOST, share // 2)
            tallies.append(run_target(target, share, drawn, clock, seed))
    return tallies


def run_inputs(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """About `count` inputs in at most `seconds`; more of those whose parser is fast."""
    import_package()
    clock = Clock(seconds)
    limit = COMMANDS_TIME * seconds
    few = max(len(commands.CASES), round(COMMANDS * count))
    # commands start threads, which a process that forks later must not have
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
        samples = child.submit(
            run_targets, commands.make_command_targets, few, limit, seed
        ).result()
    rest = max(0.0, seconds - clock.seconds)
    return [*run_targets(make_targets, count - few, rest, seed), *samples]
