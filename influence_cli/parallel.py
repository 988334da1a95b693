"""Which part of the work is mine: `--shard i/n`, a stretch of the training examples; torchrun's ranks, which share one job.

Importing it imports nothing heavy: the command line asks for its place before any work.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.errors import UsageProblem

if TYPE_CHECKING:
    import numpy as np

    Ids = range | np.ndarray  # rising example ids

COARSE, FINE = 4096, 64  # shards are cut at multiples of these: units of the cache begin at powers of two, COARSE is their most
EXPECTED = "expected: i/n (shard i of n, i from 1), auto, or auto/n in a job array that does not say how many there are"


# ---------------------------------------------------------------- shards
@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def of(self, ids: "Ids") -> "Ids":
        """Those of the rising ids that are this shard's: a stretch, maybe empty. All shards together have each id once.

        Cut where units and batches begin (multiples of 4096), so that a shard gives the bits of the whole; where that would be uneven,
        at a smaller power of two, at least 64.
        """
        size = COARSE
        while size > FINE and len(ids) < 4 * self.count * size:
            size //= 2
        first, last = (_cut(ids, number * len(ids) // self.count, size) for number in (self.index - 1, self.index))
        return ids[first:last]


def _cut(ids: "Ids", position: int, size: int) -> int:
    """The position nearest to this one at which a multiple of `size` lies between two ids; both ends are cuts."""
    if position in (0, len(ids)):
        return position
    line = int(ids[position]) // size * size
    below, above = bisect_left(ids, line), bisect_left(ids, line + size)
    return below if position - below <= above - position else above


def parse_shard(spec: str, environ: Mapping[str, str]) -> Shard:
    """`--shard i/n`, `auto`, or `auto/n`. Raises UsageProblem: not that, or no job array to be found."""
    match = re.fullmatch(r"(\d+|auto)(?:/(\d+))?", spec)
    if not match or (match[1] != "auto" and match[2] is None):
        raise UsageProblem(f"--shard {spec}", EXPECTED)
    count = int(match[2]) if match[2] else None
    if count == 0:
        raise UsageProblem(f"--shard {spec}: no shards", EXPECTED)
    if match[1] != "auto":
        assert count is not None
        if not 1 <= int(match[1]) <= count:
            raise UsageProblem(f"--shard {spec}: no such shard", f"expected: 1/{count} to {count}/{count}")
        return Shard(int(match[1]), count)
    return _of_array(spec, count, environ)


@dataclass(frozen=True)
class Array:
    """How a scheduler tells a job its place in an array. Slurm and SGE say where the array begins and ends and its step, LSF all but the
    beginning, PBS and Kubernetes only the place."""

    name: str
    place: str
    first: str | int
    last: str | None = None
    step: str | None = None
    count: str | None = None
    unset: str = ""  # what `place` is outside of an array


ARRAYS = (
    Array(
        "Slurm", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP", "SLURM_ARRAY_TASK_COUNT"
    ),
    Array("LSF", "LSB_JOBINDEX", 1, "LSB_JOBINDEX_END", "LSB_JOBINDEX_STEP", unset="0"),
    Array("SGE", "SGE_TASK_ID", "SGE_TASK_FIRST", "SGE_TASK_LAST", "SGE_TASK_STEPSIZE", unset="undefined"),
    Array("PBS", "PBS_ARRAY_INDEX", 1),
    Array("PBS", "PBS_ARRAYID", 1),
    Array("Kubernetes", "JOB_COMPLETION_INDEX", 0),
)


def _of_array(spec: str, count: int | None, environ: Mapping[str, str]) -> Shard:
    """The place in a job array. With `count` the array is 1 to n (Kubernetes: 0 to n - 1), so that one job of it can be run again alone."""
    array = next((array for array in ARRAYS if environ.get(array.place, "") not in ("", array.unset)), None)
    if array is None:
        looked = ", ".join(array.place for array in ARRAYS)
        raise UsageProblem(f"--shard {spec}: this is no job of an array", f"looked for: {looked}", "--shard i/n says it outright")

    def number(name: str | int | None) -> int | None:
        if not isinstance(name, str):
            return name
        text = environ.get(name, "")
        if text and not text.isdecimal():
            raise UsageProblem(f"--shard {spec}: {name} is {text!r}", "expected: a number", "--shard i/n says it outright")
        return int(text) if text else None

    place, first, last, step = number(array.place), number(array.first), number(array.last), number(array.step) or 1
    assert place is not None
    found = f"--shard {spec}: {array.place} is {place}"
    if count is not None:
        lowest = 0 if array.name == "Kubernetes" else 1
        if not lowest <= place < lowest + count:
            raise UsageProblem(found, f"expected: {lowest} to {lowest + count - 1}, the places of {count} jobs of {array.name}")
        return Shard(place - lowest + 1, count)
    if first is None or last is None:
        raise UsageProblem(
            f"{found}, and {array.name} does not say of how many",
            f"--shard auto/n says it, where the array is {'0 to n - 1' if array.name == 'Kubernetes' else '1 to n'}",
        )
    total = (last - first) // step + 1
    told = number(array.count) or total
    if first > 1 or not first <= place <= last or (place - first) % step or told != total:
        raise UsageProblem(
            f"{found}, in an array with gaps, or one that begins elsewhere than at 0 or 1 ({first} to {last} by {step}, {told} jobs)",
            "--shard auto/n, where the array is 1 to n, lets some of its jobs be run again; --shard i/n says it outright",
        )
    return Shard((place - first) // step + 1, total)
