"""The methods, one line each. The first is the default of `score`."""

from collections.abc import Iterable

from influence_cli.methods import (
    dve,
    grad_cos,
    grad_dot,
    in_run,
    influence,
    random,
    repsim,
    tracin,
    tracin_we,
    trak,
    unroll,
)
from influence_cli.methods.declaration import Method

_METHODS = (
    tracin.METHOD,
    grad_dot.METHOD,
    grad_cos.METHOD,
    influence.METHOD,
    dve.METHOD,
    unroll.METHOD,
    in_run.METHOD,
    tracin_we.METHOD,
    trak.METHOD,
    repsim.METHOD,
    random.METHOD,
)
METHODS: dict[str, Method] = {method.name: method for method in _METHODS}
SELF_METHODS = {name: method for name, method in METHODS.items() if method.has_self}


def describe_methods(names: Iterable[str]) -> str:
    """What these methods are: `tracin: ...; grad-dot: ....`"""
    return "; ".join(f"{name}: {METHODS[name].help}" for name in names) + "."


def describe_parts() -> str:
    """The parts of scores, each with the methods that have it: `word (METHOD)`."""
    parts = dict.fromkeys(part for method in METHODS.values() for part in method.parts)
    owners = {part: [n for n, method in METHODS.items() if part in method.parts] for part in parts}
    return ", ".join(
        part if len(names) == len(METHODS) else f"{part} ({', '.join(names)})"
        for part, names in owners.items()
    )
