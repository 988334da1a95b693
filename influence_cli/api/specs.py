"""What flags say, read into values: example ids, tops, group names. A problem names the flag."""

import math
import os
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from influence_cli.errors import UsageProblem, listed
from influence_cli.methods.declaration import Method
from influence_cli.methods.layer_aggregates import VOTES, Aggregate
from influence_cli.methods.table import METHODS
from influence_cli.parallel.ranks import place_of
from influence_cli.parallel.shards import Shard, parse_digits, parse_shard

LONGEST_ID = 18  # digits that surely fit into 64 bits
LONGEST_SHOWN = 60  # characters of a flag's value in a message
LARGEST_SEED, LARGEST_PROJECTION = 2**63 - 1, 2**31 - 1
EXPECTED = (
    "expected: ids like 0,5,10:20 (half-open), @FILE with such ids, or - to read them from a pipe"
)


def ids(flag: str, spec: str | None, size: int, source: str, stdin: IO[str]) -> range | np.ndarray:
    """`--queries`, `--train`: rising distinct ids of a dataset of `size`; a range where they are
    one. None: all. `source`: what messages call the dataset.
    """
    if spec is None:
        return range(size)
    if spec == "-":
        if stdin.isatty():
            raise UsageProblem(
                f"{flag} -: stdin is a terminal", "pipe the ids in, one or many a line"
            )
        try:
            parts = split_ids(stdin)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageProblem(f"{flag} -: {error}", "expected: ids as text") from error
    elif spec.startswith("@"):
        try:
            with Path(spec[1:]).open(encoding="utf-8") as file:
                parts = split_ids(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageProblem(f"{flag} {spec}: {error}", "expected: a text file of ids") from error
    else:
        parts = split_ids([spec])
    if not parts:
        raise UsageProblem(f"{flag} {spec}: no ids", EXPECTED)
    if len(parts) == 1:
        return _range(flag, parts[0], size, source)
    distinct = _distinct_numbers(parts, size)
    if distinct is None:
        ranges = [_range(flag, part, size, source) for part in parts]
        distinct = np.unique(np.concatenate([np.arange(r.start, r.stop) for r in ranges]))
    return as_range(distinct)


def as_range(distinct: np.ndarray) -> range | np.ndarray:
    """Rising distinct ids, as a range where they are one."""
    first, last = int(distinct[0]), int(distinct[-1])
    return range(first, last + 1) if len(distinct) == last - first + 1 else distinct


def _distinct_numbers(parts: Sequence[str], size: int) -> np.ndarray | None:
    """The numbers, rising, of a list without ranges, which may be long. None if one is no id."""
    if not all(len(part) <= LONGEST_ID and part.isdecimal() for part in parts):
        return None
    distinct = np.array(sorted(set(map(int, parts))), dtype=np.int64)
    return distinct if distinct[-1] < size else None


def split_ids(lines: Iterable[str]) -> list[str]:
    """Parts between commas, blanks and line ends; `#` begins a comment."""
    return [part for line in lines for part in re.split(r"[,\s]+", line.partition("#")[0]) if part]


def _range(flag: str, part: str, size: int, source: str) -> range:
    match = re.fullmatch(r"(\d+)|(\d*):(\d*)", part)
    if not match:
        raise UsageProblem(f"{flag}: {part[:LONGEST_SHOWN]!r} is not an id or a range", EXPECTED)
    single, low, high = match.groups()
    start, stop = (
        (parse_digits(single), parse_digits(single) + 1)
        if single
        else (parse_digits(low or "0"), parse_digits(high) if high else size)
    )
    if stop > size or start >= size:
        raise out_of_range(flag, part, size, source)
    if start >= stop:
        raise UsageProblem(
            f"{flag} {part[:LONGEST_SHOWN]}: an empty range",
            "ranges are half-open: 10:20 is 10 to 19",
        )
    return range(start, stop)


def out_of_range(flag: str, part: str, size: int, source: str) -> UsageProblem:
    return UsageProblem(
        f"{flag} {part[:LONGEST_SHOWN]}: out of range",
        f"{source} has {size:,} examples (0 to {size - 1:,})",
    )


def check_stdin(queries: str | None, train: str | None) -> None:
    if queries == "-" and train == "-":
        raise UsageProblem(
            "--queries - and --train - both read the ids from stdin",
            "put one of them in a file: @ids.txt",
        )


def shard(spec: str | None) -> Shard | None:
    """`--shard`: which part of the training examples; None: all."""
    count = place_of(os.environ).count
    if spec is not None and count > 1:
        raise UsageProblem(
            f"--shard {spec} in one of {count} ranks, which share all the work as it is",
            "give --shard, or use torchrun",
        )
    return parse_shard(spec, os.environ) if spec is not None else None


def check_shard(part: Shard | None, group_by: str | None) -> None:
    """The tables of shards can be merged: a shard can't sum over groups of all examples."""
    if part and group_by:
        raise UsageProblem(
            "--group-by sums over all training examples, --shard scores some of them",
            "torchrun divides such work between ranks",
        )


def top(value: str) -> int | None:
    """`--top`: a number from 1, or None for `all`."""
    if value == "all":
        return None
    if not value.isdecimal() or parse_digits(value) < 1:
        raise UsageProblem(f"--top {value[:LONGEST_SHOWN]}", "expected: a number from 1, or all")
    return parse_digits(value)


def number_or_share(flag: str, value: str) -> int | Fraction:
    """`N` as a number from 1, or `P%` as a fraction above 0, at most 1."""
    percent = re.fullmatch(r"(\d{1,18}(\.\d{1,18})?)%", value, re.ASCII)
    if percent and 0 < Fraction(percent[1]) <= 100:
        return Fraction(percent[1]) / 100
    if value.isascii() and value.isdecimal() and parse_digits(value) >= 1:
        return parse_digits(value)
    raise UsageProblem(
        f"{flag} {value[:LONGEST_SHOWN]}",
        "expected: a number from 1, or a percentage up to 100%, such as 5%",
    )


def batch_size(value: str) -> int | None:
    """`--batch-size`: a number from 1, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or parse_digits(value) < 1:
        raise UsageProblem(
            f"--batch-size {value[:LONGEST_SHOWN]}", "expected: a number from 1, or auto"
        )
    return parse_digits(value)


def one_of(flag: str, value: str, choices: Iterable[str]) -> str:
    if value not in choices:
        raise UsageProblem(f"{flag} {value}: unknown", f"expected: {', '.join(choices)}")
    return value


def check_by(by: str | None, method: Method, group_by: str | None) -> None:
    """`--by`: one of the method's parts, and one that groups have where scores are summed."""
    if by is not None and by not in method.parts:
        raise UsageProblem(
            f"--by {by}: the scores of {method.name} have no such parts",
            f"expected: {', '.join(method.parts)}" if method.parts else "leave out --by",
        )
    if by in method.pair_parts and group_by:
        raise UsageProblem(
            f"--by {by} splits the scores of pairs, --group-by sums them over groups",
            "give one of them",
        )


def aggregate(value: str | None) -> Aggregate | None:
    """`--aggregate`; None: the sum over layers."""
    match = re.fullmatch(r"(sum|rank)|vote(?::(\d+))?", value if value is not None else "sum")
    votes = parse_digits(match[2]) if match and match[2] else VOTES
    if not match or votes < 1:
        raise UsageProblem(
            f"--aggregate {str(value)[:LONGEST_SHOWN]}: unknown",
            "expected: sum, rank, vote, or vote:K with a number K from 1",
        )
    return None if match[1] == "sum" else Aggregate(match[1] or "vote", votes)


def check_aggregate(
    rule: Aggregate | None, part: Shard | None, method: Method | None = None, by: str | None = None
) -> None:
    """`--aggregate rank|vote`: it orders all training examples by each layer of their scores."""
    if rule is None:
        return
    if method is not None and "layer" not in method.parts:
        names = [name for name, other in METHODS.items() if "layer" in other.parts]
        raise UsageProblem(
            f"--aggregate {rule}: the scores of {method.name} have no parts by layer",
            f"methods that have them: {', '.join(names)}",
        )
    if by not in (None, "layer"):
        raise UsageProblem(
            f"--aggregate {rule} orders the layers' scores, --by {by} splits their sums",
            "expected: --by layer, or none",
        )
    if part is not None:
        raise UsageProblem(
            f"--aggregate {rule} orders all training examples, --shard scores some of them",
            "torchrun divides such work between ranks; --queries divides it between jobs",
        )


def check_rates(methods: Sequence[Method], lr: float | None, lr_weights: str | None) -> None:
    """`--lr`, `--lr-weights`: at least one of several methods must have learning-rate weights."""
    if (lr is not None or lr_weights is not None) and not any(m.weighted for m in methods):
        raise UsageProblem(
            f"--method {', '.join(method.name for method in methods)} has no learning-rate weights",
            "leave out --lr and --lr-weights",
        )


def check_seed(seed: int | None) -> None:
    """`--seed`."""
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UsageProblem(
            f"--seed {str(seed)[:LONGEST_SHOWN]}", f"expected: a number from 0 to {LARGEST_SEED}"
        )


def projection(
    numbers: int | None, kind: str | None, seed: int | None, searched: bool = False
) -> tuple[str, int, int] | None:
    """`--project`, `--projection`, `--seed` as kind, numbers and seed; None: exact gradients.
    `searched`: K is asked for.
    """
    chosen = one_of(
        "--projection",
        kind or "tensor-sketch",
        ("tensor-sketch", "sparse", "khatri-rao", "kronecker"),
    )
    if numbers is None:
        if kind is not None and not searched:
            raise UsageProblem(
                f"--projection {kind} without --project",
                "--project K says how many numbers a parameter keeps",
            )
        return None
    if not 1 <= numbers <= LARGEST_PROJECTION:
        raise UsageProblem(
            f"--project {str(numbers)[:LONGEST_SHOWN]}",
            f"expected: a number from 1 to {LARGEST_PROJECTION:,}; without --project gradients are "
            "exact",
        )
    if chosen == "kronecker" and math.isqrt(numbers) ** 2 != numbers:
        near = math.isqrt(numbers)
        raise UsageProblem(
            f"--project {numbers} with --projection kronecker",
            f"expected: a square, such as {near**2} or {(near + 1) ** 2}",
        )
    check_seed(seed)
    return chosen, numbers, seed or 0


def target(value: float | None) -> float | None:
    """`--target-correlation`."""
    if value is not None and not 0 < value < 1:
        raise UsageProblem(
            f"--target-correlation {value}", "expected: a number between 0 and 1, such as 0.95"
        )
    return value


def group_file(path: Path, size: int) -> list[str]:
    """`--group-by FILE`: one group name per training example, a line each."""
    try:
        # not splitlines, which ends a line at characters that a name may hold
        names = path.read_text(encoding="utf-8").split("\n")
        names = names[:-1] if not names[-1] else names  # the end of the last line
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(
            f"--group-by {path}: {error}",
            "expected: label, or a file with one group name per training example",
        ) from error
    if len(names) != size:
        raise UsageProblem(
            f"--group-by {path} has {len(names):,} lines",
            f"expected: one per training example, {size:,}",
        )
    empty = [number for number, name in enumerate(names, start=1) if not name.strip()]
    if empty:
        raise UsageProblem(
            f"--group-by {path}: empty lines {listed(empty)}", "expected: a group name on each line"
        )
    return [name.strip() for name in names]
