"""Counts what a part of the campaign tried, and the faults that it met."""

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = ("lost", "silent", "traceback")
SHOWN = 400  # characters of a reproduction


@dataclass
class Tally:
    """The counts of one row of the table.

    `refused`: trials that ended in a clean error. `causes`: for each kind and cause of a fault,
    how often it came and the first reproduction.
    """

    name: str
    tried: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    causes: dict[str, list] = field(default_factory=dict)  # "kind: cause" -> [count, reproduction]
    seconds: float = 0.0

    def fault(self, kind: str, cause: str, reproduction: object) -> None:
        """Count a fault. `kind`: lost (work or bytes), silent, or traceback (or hang)."""
        self.faults[kind] += 1
        entry = self.causes.setdefault(f"{kind}: {cause}", [0, str(reproduction)[:SHOWN]])
        entry[0] += 1

    def crash(self, error: BaseException, reproduction: object) -> None:
        """Count an exception that is no clean refusal, by its type and place in the package."""
        self.fault("traceback", f"{type(error).__name__} in {place_of_error(error)}", reproduction)

    @property
    def is_clean(self) -> bool:
        return not any(self.faults.values())


def place_of_error(error: BaseException) -> str:
    """The innermost function of the package in the error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "influence_cli" in frame.filename]
    frame = (own or list(frames) or [None])[-1]
    if frame is None:
        return "unknown"
    name = frame.filename.rpartition("influence_cli/")[2]
    return f"{name}:{frame.name}"


class Clock:
    """Ends a part when its time is over or its count is reached."""

    def __init__(self, seconds: float) -> None:
        self.start = time.monotonic()
        self.stop = self.start + seconds

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.stop

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start


def format_table(tallies: Iterable[Tally]) -> str:
    """A table in Markdown: one line per tally."""
    lines = [
        "| part | tried | refused cleanly | lost | silent | tracebacks |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for tally in tallies:
        counts = (tally.tried, tally.refused, *(tally.faults[kind] for kind in KINDS))
        lines.append(f"| {tally.name} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    return "\n".join(lines)


def format_causes(tallies: Iterable[Tally]) -> str:
    """One line per cause of a fault, with its first reproduction."""
    return "\n".join(
        f"{tally.name}: {cause} ({count:,} times); first: {' '.join(reproduction.split())}"
        for tally in tallies
        for cause, (count, reproduction) in sorted(tally.causes.items())
    )
