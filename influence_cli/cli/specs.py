"""What flags say, read into values: example ids, tops, group names. A problem names the flag."""

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from influence_cli.cli.options import Values, Words
from influence_cli.errors import UsageProblem, listed
from influence_cli.methods.declaration import Method
from influence_cli.methods.table import METHODS
from influence_cli.parallel import Shard, parse_shard, place_of

EXPECTED = (
    "expected: ids like 0,5,10:20 (half-open), @FILE with such ids, or - to read them from a pipe"
)


def ids(flag: str, spec: str | None, size: int, split: str, stdin: IO[str]) -> range | np.ndarray:
    """`--queries`, `--train`: rising distinct ids of a dataset of `size`; a range where they are one. None: all."""
    if spec is None:
        return range(size)
    if spec == "-":
        if stdin.isatty():
            raise UsageProblem(
                f"{flag} -: stdin is a terminal", "pipe the ids in, one or many a line"
            )
        parts = split_ids(stdin)
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
    ranges = [_range(flag, part, size, split) for part in parts]
    if len(ranges) == 1:
        return ranges[0]
    found = np.unique(np.concatenate([np.arange(r.start, r.stop) for r in ranges]))
    return (
        range(int(found[0]), int(found[-1]) + 1)
        if len(found) == found[-1] - found[0] + 1
        else found
    )


def split_ids(lines: Iterable[str]) -> list[str]:
    """Parts between commas, blanks and line ends; `#` begins a comment."""
    return [part for line in lines for part in re.split(r"[,\s]+", line.partition("#")[0]) if part]


def _range(flag: str, part: str, size: int, split: str) -> range:
    match = re.fullmatch(r"(\d+)|(\d*):(\d*)", part)
    if not match:
        raise UsageProblem(f"{flag}: {part!r} is not an id or a range", EXPECTED)
    single, low, high = match.groups()
    start, stop = (
        (int(single), int(single) + 1) if single else (int(low or 0), int(high) if high else size)
    )
    if stop > size or start >= size:
        raise UsageProblem(
            f"{flag} {part}: out of range",
            f"{split}_data() has {size:,} examples (0 to {size - 1:,})",
        )
    if start >= stop:
        raise UsageProblem(
            f"{flag} {part}: an empty range", "ranges are half-open: 10:20 is 10 to 19"
        )
    return range(start, stop)


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


def check_shard(part: Shard | None, name: str, method: Method, group_by: str | None) -> None:
    """Scores of a shard must be parts of a whole that can be merged."""
    if part and group_by:
        raise UsageProblem(
            "--group-by sums over all training examples, --shard has some of them",
            "torchrun shares such work between ranks",
        )
    if part and method.ordered:
        raise UsageProblem(
            f"--shard: --method {name} goes back over whole steps, not over a part of the examples",
            "--queries splits its work: tables of different queries simply follow one another",
        )


def top(value: str) -> int | None:
    """`--top`: a number from 1, or None for `all`."""
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UsageProblem(f"--top {value}", "expected: a number from 1, or all")
    return int(value)


def batch_size(value: str) -> int | None:
    """`--batch-size`: a number from 1, or None for `auto`."""
    if value == "auto":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise UsageProblem(f"--batch-size {value}", "expected: a number from 1, or auto")
    return int(value)


def one_of(flag: str, value: str, choices: Iterable[str]) -> str:
    if value not in choices:
        raise UsageProblem(f"{flag} {value}: unknown", f"expected: {', '.join(choices)}")
    return value


def check_words(method: str, reads_words: bool, words: Words, layers: list[str] | None) -> None:
    """The flags of tracin-we: only there, and what they can be."""
    if (given := flags_given(words)) and not reads_words:
        raise UsageProblem(
            f"{given}: --method {method} does not read words", "--method tracin-we does"
        )
    if reads_words and layers:
        raise UsageProblem(
            f"--layers with --method {method}, which reads one embedding and nothing else",
            "--embedding NAME chooses it",
        )
    one_of("--special-tokens", words.special_tokens, ("keep", "drop", "only"))
    for flag, value in (("--top-words", words.top_words), ("--synonyms", words.synonyms)):
        if value is not None and value < 1:
            raise UsageProblem(f"{flag} {value}", "expected: a number from 1")


def projection(
    numbers: int | None, kind: str | None, seed: int | None, searched: bool = False
) -> tuple[str, int, int] | None:
    """`--project`, `--projection`, `--seed` as kind, numbers and seed; None: exact gradients. `searched`: K is asked for."""
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
    if numbers < 1:
        raise UsageProblem(
            f"--project {numbers}",
            "expected: a number from 1; without --project gradients are exact",
        )
    if chosen == "kronecker" and math.isqrt(numbers) ** 2 != numbers:
        near = math.isqrt(numbers)
        raise UsageProblem(
            f"--project {numbers} with --projection kronecker",
            f"expected: a square, such as {near**2} or {(near + 1) ** 2}",
        )
    if seed is not None and seed < 0:
        raise UsageProblem(f"--seed {seed}", "expected: a number from 0")
    return chosen, numbers, seed or 0


def target(value: float | None) -> float | None:
    """`--target-correlation`."""
    if value is not None and not 0 < value < 1:
        raise UsageProblem(
            f"--target-correlation {value}", "expected: a number between 0 and 1, such as 0.95"
        )
    return value


def check_projected(name: str, method: Method, numbers: int | None) -> None:
    """Methods that read what a projection does not keep."""
    if numbers is not None and (method.words or method.module == "unroll"):
        why = (
            "reads the rows of single words"
            if method.words
            else "asks the model itself, and keeps no gradients of training examples"
        )
        raise UsageProblem(f"--project with --method {name}, which {why}", "leave out --project")


def check_values(method: str, curvatures: Sequence[str], values: Values, normalize: bool) -> None:
    """The flags of methods that go by the order of training: only there, and what they can be."""
    if (given := flags_given(values)) and not curvatures:
        raise UsageProblem(
            f"{given}: --method {method} does not go by the order of training",
            "--method dve and unroll do",
        )
    if curvatures and normalize:
        raise UsageProblem(
            f"--normalize: scores of {method} are changes of a loss, not products that could be cosines",
            "leave it out",
        )
    if values.curvature is not None and values.curvature not in curvatures:
        known = "; ".join(
            f"{name}: {', '.join(other.curvatures)}"
            for name, other in METHODS.items()
            if other.curvatures
        )
        raise UsageProblem(
            f"--curvature {values.curvature} with --method {method}", f"expected: {known}"
        )
    embedding = values.form is not None or values.embeddings is not None
    if embedding and method != "dve":
        raise UsageProblem(
            f"--form, --embeddings: {method} has no embedding form, the model is asked itself",
            "--method dve has",
        )
    if values.form is not None:
        one_of("--form", values.form, ("query", "embedding"))
    if values.replay and (values.form == "embedding" or values.embeddings is not None):
        raise UsageProblem(
            "--replay gives query form: embeddings are made from cached gradients, side by side",
            "leave one of them out",
        )
    if values.form == "query" and values.embeddings is not None:
        raise UsageProblem(
            "--form query keeps no embeddings, --embeddings says where", "give one of them"
        )
    if values.embeddings is not None and values.embeddings.is_file():
        raise UsageProblem(
            f"--embeddings {values.embeddings}: a file is there",
            "expected: a folder, or a name for a new one",
        )


def flags_given(group: Words | Values) -> str:
    """`--top-words, --synonyms`: those flags of a group that are not as they are by default."""
    fields = dataclasses.fields(group)
    return ", ".join(
        f"--{field.name.replace('_', '-')}"
        for field in fields
        if getattr(group, field.name) != field.default
    )


def group_file(path: Path, size: int) -> list[str]:
    """`--group-by FILE`: one group name per training example, a line each."""
    try:
        names = path.read_text(encoding="utf-8").splitlines()
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
