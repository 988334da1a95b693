"""A kind of input: how to draw one, the function that parses it, and how an outcome counts.

An input is accepted and right, refused cleanly (InfluenceError), or a fault: a traceback, a hang,
or a silent difference from an independent reading.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from faults.tally import Clock, Tally
from faults.time_limit import Stopped, time_limit
from influence_cli.errors import InfluenceError

HANG = 2.0  # seconds of processor time that one input may take: the machine may be busy
GIVE_UP = 20.0  # seconds after which an input is stopped
LONGEST_SHOWN = 4000  # characters of an input that hangs


class SilentFault(Exception):
    """An input was accepted, and read as something that it does not say."""


class Refused(Exception):
    """A command ended with exit 1 or 2 and one message."""


class CommandFault(Exception):
    """A command ended in another way than it may: a traceback, a hang, or several messages."""


def expect(holds: bool, cause: str) -> None:
    if not holds:
        raise SilentFault(cause)


@dataclass(frozen=True)
class Target:
    """`make` draws an input; `parse` reads it, and raises SilentFault where it reads it wrongly.

    `weight`: its share of the count, relative to the other kinds. `extremes`: inputs that are tried
    first, up to half of the count. `strategy`: hypothesis draws a part of the inputs from it.
    """

    name: str
    make: Callable[[Random], Any]  # Any: the input of `parse`
    parse: Callable[[Any], None]
    weight: float
    refusals: tuple[type[Exception], ...] = (InfluenceError,)
    extremes: Callable[[], Iterable[Any]] = tuple
    strategy: SearchStrategy | None = None


def try_input(target: Target, value: object, tally: Tally) -> None:
    start, was_stopped = time.process_time(), False
    try:
        with time_limit(GIVE_UP):
            target.parse(value)
    except SilentFault as fault:
        tally.fault("silent", str(fault), repr(value))
    except CommandFault as fault:
        tally.fault("traceback", str(fault), repr(value))
    except target.refusals:
        tally.refused += 1
    except Stopped:
        was_stopped = True
    except Exception as error:
        tally.crash(error, repr(value))
    if was_stopped or time.process_time() - start > HANG:
        tally.fault("hang", f"longer than {HANG} s", repr(value)[:LONGEST_SHOWN])
    tally.tried += 1


def run_target(target: Target, count: int, drawn: int, clock: Clock, number: int) -> Tally:
    """`count` inputs of one kind, `drawn` of them by hypothesis. `number`: the seed."""
    tally, rng = Tally(f"inputs: {target.name}", target=count), Random(f"{number} {target.name}")
    for value in itertools.islice(target.extremes(), max(1, count // 2)):
        try_input(target, value, tally)
    if target.strategy is not None:
        try_drawn(target, target.strategy, drawn, clock, number, tally)
    while tally.tried < count and not clock.is_over:
        try_input(target, target.make(rng), tally)
    tally.seconds = clock.seconds
    return tally


def try_drawn(
    target: Target, strategy: SearchStrategy, count: int, clock: Clock, number: int, tally: Tally
) -> None:
    """Inputs that hypothesis draws, each counted by its outcome; nothing is shrunk."""

    @seed(number)
    @settings(
        max_examples=max(1, count),
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def try_one(value: object) -> None:
        if not clock.is_over:
            try_input(target, value, tally)

    try_one()
