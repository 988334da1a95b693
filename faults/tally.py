"""Counts what a part of the campaign tried, and the faults that it met."""

import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field

KINDS = ("lost", "silent", "traceback", "hang")
SHOWN = 400  # characters of a reproduction; that of a hang is shown whole


@dataclass
class Tally:
    """The counts of one row of the table.

    `target`: how many trials there should be; 0 if no count was set. `refused`: trials that ended
    in a clean error. `causes`: for each kind and cause of a fault, how often it came and the first
    reproduction.
    """

    name: str
    tried: int = 0
    target: int = 0
    refused: int = 0
    faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    causes: dict[str, list] = field(default_factory=dict)  # "kind: cause" -> [count, reproduction]
    seconds: float = 0.0

    def fault(self, kind: str, cause: str, reproduction: object) -> None:
        """Count a fault. `kind`: lost (work or bytes), silent, traceback, or hang."""
        self.faults[kind] += 1
        text = str(reproduction)[: None if kind == "hang" else SHOWN]
        entry = self.causes.setdefault(f"{kind}: {cause}", [0, text])
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
    frame = next(reversed(own or list(frames)), None)
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
    """A table in Markdown: one line per tally. "9 of 10": the time was over before the target."""
    lines = [
        "| part | tried | refused cleanly | lost | silent | tracebacks | hangs |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for tally in tallies:
        counts = (tally.refused, *(tally.faults[kind] for kind in KINDS))
        tried = f"{tally.tried:,}"
        if tally.tried < tally.target:
            tried += f" of {tally.target:,}"
        cells = (tally.name, tried, *(f"{count:,}" for count in counts))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_causes(tallies: Iterable[Tally]) -> str:
    """One line per cause of a fault, with its first reproduction; of a hang, its whole output."""
    lines = []
    for tally in tallies:
        for cause, (count, reproduction) in sorted(tally.causes.items()):
            text = reproduction if cause.startswith("hang") else " ".join(reproduction.split())
            lines.append(f"{tally.name}: {cause} ({count:,} times); first: {text}")
    return "\n".join(lines)
