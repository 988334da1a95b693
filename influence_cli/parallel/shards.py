"""`--shard i/n`: the part of the training examples that one job of a job array computes.

Importing this module imports nothing heavy.
"""

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from influence_cli.errors import UsageProblem

if TYPE_CHECKING:
    import numpy as np

    Ids = range | np.ndarray  # rising example ids

# A shard begins at a multiple of COARSE, or of a smaller power of two down to FINE. Units of the
# cache begin at powers of two, COARSE at most.
COARSE, FINE = 4096, 64
EXPECTED = (
    "expected: i/n (shard i of n, counted from 1), or auto or auto/n in a job array of Slurm or "
    "Kubernetes"
)


@dataclass(frozen=True)
class Shard:
    """Part `index` (from 1) of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index} of {self.count}"

    def of(self, ids: "Ids") -> "Ids":
        """The consecutive ids of this shard, possibly none. Each rising id is in one shard.

        Shards are cut where units and batches begin (multiples of 4096), so a shard gives the bits
        of a run without shards. If that would be uneven: at a smaller power of two, at least 64.
        """
        size = COARSE
        while size > FINE and len(ids) < 4 * self.count * size:
            size //= 2
        first, last = (
            nearest_cut(ids, number * len(ids) // self.count, size)
            for number in (self.index - 1, self.index)
        )
        return ids[first:last]


def nearest_cut(ids: "Ids", position: int, size: int) -> int:
    """The nearest position at which a multiple of `size` lies between two ids. Both ends are
    cuts.
    """
    if position in (0, len(ids)):
        return position
    line = int(ids[position]) // size * size
    below, above = bisect_left(ids, line), bisect_left(ids, line + size)
    return below if position - below <= above - position else above


def parse_digits(text: str) -> int:
    """A whole number. More than 18 digits give 10^18, which is above every size of a run."""
    digits = text.lstrip("0") or "0"
    return int(digits) if len(digits) <= 18 else 10**18


def parse_shard(spec: str, environ: Mapping[str, str]) -> Shard:
    """Parse `i/n`, `auto` or `auto/n`. Raises UsageProblem for another text, or if `auto` finds no
    job array.
    """
    match = re.fullmatch(r"(\d+|auto)(?:/(\d+))?", spec)
    if not match or (match[1] != "auto" and match[2] is None):
        raise UsageProblem(f"--shard {spec}: not a shard", EXPECTED)
    count = parse_digits(match[2]) if match[2] else None
    if count == 0:
        raise UsageProblem(f"--shard {spec}: the number of shards is 0", EXPECTED)
    if match[1] != "auto":
        assert count is not None
        if not 1 <= parse_digits(match[1]) <= count:
            raise UsageProblem(
                f"--shard {spec[:60]}: no such shard", f"expected: 1/{count} to {count}/{count}"
            )
        return Shard(parse_digits(match[1]), count)
    return shard_of_array(spec, count, environ)


def shard_of_array(spec: str, count: int | None, environ: Mapping[str, str]) -> Shard:
    """The shard of this job in an array of Slurm or Kubernetes.

    With `count` the jobs have the indices 1 to n (Kubernetes: 0 to n - 1), so a single job can be
    re-run.
    """
    if environ.get("SLURM_ARRAY_TASK_ID"):
        name, lowest = "SLURM_ARRAY_TASK_ID", 1
    elif environ.get("JOB_COMPLETION_INDEX"):
        name, lowest = "JOB_COMPLETION_INDEX", 0
    else:
        raise UsageProblem(
            f"--shard {spec}: this process is not part of a Slurm or Kubernetes job array",
            "expected: SLURM_ARRAY_TASK_ID or JOB_COMPLETION_INDEX in the environment",
            "name the shard: --shard $INDEX/$COUNT, counted from 1",
        )
    index = parse_number(spec, name, environ)
    if count is None:
        return slurm_shard(spec, index, environ) if lowest else refuse_unknown_count(spec, index)
    if not lowest <= index < lowest + count:
        raise UsageProblem(
            f"--shard {spec}: {name} is {index}",
            f"expected: {lowest} to {lowest + count - 1} for an array of {count} jobs",
        )
    return Shard(index - lowest + 1, count)


def parse_number(
    spec: str, name: str, environ: Mapping[str, str], default: int | None = None
) -> int:
    """The number in an environment variable. Raises UsageProblem if it is none."""
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UsageProblem(
            f"--shard {spec}: {name} is {text!r}",
            "expected: a number",
            "name the shard: --shard $INDEX/$COUNT",
        )
    return parse_digits(text)


def refuse_unknown_count(spec: str, index: int) -> NoReturn:
    raise UsageProblem(
        f"--shard {spec}: Kubernetes does not give the number of jobs",
        f"found: JOB_COMPLETION_INDEX is {index}",
        "give the number, for indices 0 to n - 1: --shard auto/n",
    )


def slurm_shard(spec: str, index: int, environ: Mapping[str, str]) -> Shard:
    """Slurm sets the first index, the last one, their step, and from version 19 on the number of
    jobs.
    """
    first = parse_number(spec, "SLURM_ARRAY_TASK_MIN", environ)
    last = parse_number(spec, "SLURM_ARRAY_TASK_MAX", environ)
    step = parse_number(spec, "SLURM_ARRAY_TASK_STEP", environ, default=1)
    total = (last - first) // max(1, step) + 1
    count = parse_number(spec, "SLURM_ARRAY_TASK_COUNT", environ, default=total)
    is_complete = step >= 1 and first <= index <= last and (index - first) % step == 0
    if first > 1 or not is_complete or count != total:
        raise UsageProblem(
            f"--shard {spec}: the Slurm array has gaps, or does not start at 0 or 1",
            f"found: index {index} in {first} to {last}, step {step}, {count} jobs",
            "to re-run some jobs of an array 1-n, give the number of shards: --shard auto/n; or "
            "name the shard: --shard $INDEX/$COUNT",
        )
    return Shard((index - first) // step + 1, total)
