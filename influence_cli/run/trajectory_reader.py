"""Reads and checks trajectory.jsonl. The format is in docs/trajectory-format.md.

A training writes it as it goes, so its last line may be incomplete.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from influence_cli.errors import TrajectoryError, listed, shown
from influence_cli.run.training_mode import read_training_mode
from influence_cli.run.trajectory import Group, Line, Trajectory
from influence_cli.storage.json_text import MAX_BYTES, ChangedText, parse_json, parse_sealed_json

FORMAT = "influence-trajectory"
EXAMPLE_HEADER = (
    f'{{"format": "{FORMAT}", "version": 1, "reduction": "mean", "optimizer": {{"name": "sgd"}}}}'
)
EXAMPLE_LINE = '{"step": 0, "lr": 0.1, "examples": [17, 4, 256]}'

CHANGED_LINE = "copy the file again; if you edited the line, remove its key crc32"

Refuse = Callable[..., TrajectoryError]  # (rest of the headline, *details)
Json = dict[str, Any]  # Any: JSON values
LINE_KEYS = {"step", "lr", "examples", "weights", "clip", "seed"}
LINE_KEYS |= {"seeds", "micro_batches", "eval"}  # training_mode.py


def read_trajectory(path: Path, n_train: int | None) -> Trajectory:
    """Reads and checks a trajectory. `n_train`: size of the training set, to check the ids.

    Drops an incomplete last line, with a note: a killed training costs one line. The later of two
    lines of one step counts: a resumed training repeats steps.
    Raises TrajectoryError with the line's number: bad JSON, bad values, unknown examples; and for
    missing steps.
    """
    lines: dict[int, Line] = {}
    notes: list[str] = []
    try:
        with path.open("rb") as file:
            header = read_header_line(path, file.readline(MAX_BYTES + 1))
            for number, text in enumerate(iter(lambda: file.readline(MAX_BYTES + 1), b""), start=2):
                if not text.endswith(b"\n") and not is_json(text):
                    notes.append(
                        f"{path.name} line {number} is cut off "
                        "(a crash while it was written); left out"
                    )
                    continue
                step, line = read_line(path, number, text, n_train, len(header.named_groups))
                lines[step] = line
    except OSError as error:
        raise TrajectoryError(f"{path} can't be read: {error.strerror}") from error
    if not lines:
        raise TrajectoryError(
            f"{path.name} has a header and no step", "expected: one line per optimizer step"
        )
    if len(lines) <= max(lines):  # steps may be enormous, so no loop runs over all of them
        missing = list(itertools.islice((n for n in range(max(lines)) if n not in lines), 9))
        count = max(lines) + 1 - len(lines)
        raise TrajectoryError(
            f"{path.name} lacks steps: {listed(missing, count=count)}",
            f"it has {len(lines):,} of the steps 0 to {max(lines):,}",
            "every step needs its line",
        )
    steps = tuple(lines[step] for step in range(len(lines)))
    return Trajectory(
        path,
        steps,
        header.reduction,
        header.optimizer,
        header.groups,
        tuple(notes),
        header.device,
    )


def is_json(text: bytes) -> bool:
    try:
        parse_json(text, finite=False)
    except ValueError:
        return False
    return True


# ---------------------------------------------------------------- header
class HeaderLine(NamedTuple):
    reduction: str | None
    optimizer: str | None
    groups: tuple[Group, ...]
    device: str | None = None

    @property
    def named_groups(self) -> list[Group]:
        return [group for group in self.groups if group.names]


def read_header_line(path: Path, text: bytes) -> HeaderLine:
    def refuse(what: str, *details: str) -> TrajectoryError:
        return TrajectoryError(f"{path.name} line 1{what}", *details)

    expected = f"expected: {EXAMPLE_HEADER}"
    try:
        header = parse_sealed_json(text)
    except ChangedText as error:
        raise refuse(f": {error}", CHANGED_LINE) from error
    except ValueError as error:
        raise refuse(f" is not a JSON object: {error}", expected) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise refuse(" is not a trajectory header", expected)
    if header.get("version") != 1:
        raise TrajectoryError(
            f"{path.name} is a trajectory of version {shown(header.get('version'))}",
            "this influence reads version 1",
        )
    reduction, optimizer = header.get("reduction"), header.get("optimizer", {})
    if reduction not in (None, "mean", "sum"):
        raise refuse(
            f": reduction is {shown(reduction)}",
            "expected: mean, sum, or none and weights in each line",
        )
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("name", ""), str):
        raise refuse(
            f": optimizer is {shown(optimizer)}",
            'expected: {"name": "sgd", "momentum": 0.9}, with torch\'s argument names',
        )
    options = {key: value for key, value in optimizer.items() if key != "name"}
    groups = read_groups(header, options, refuse)
    name = optimizer["name"].lower() if "name" in optimizer else None
    device = header.get("device")
    if device is not None and not isinstance(device, str):
        raise refuse(f": device is {shown(device)}", "expected: cpu, cuda or mps")
    return HeaderLine(reduction, name, groups or (Group((), options),), device)


def read_groups(header: Json, options: Json, refuse: Refuse) -> tuple[Group, ...]:
    """The header's parameter groups. `options`: those of the optimizer, which a group overrides."""
    groups = []
    try:
        for group in header.get("groups", []):
            names = tuple(str(name) for name in group["params"])
            own = {key: value for key, value in group.items() if key != "params"}
            groups.append(Group(names, options | own))
    except (TypeError, KeyError):
        raise refuse(
            ": `groups` can't be read",
            'expected: [{"params": ["head.weight", ...]}, ...], one per parameter group',
        ) from None
    counts = Counter(name for group in groups for name in set(group.names))
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise refuse(
            f": {listed(sorted(repeated))} in two groups",
            "expected: each trained parameter in one group",
        )
    if any(not group.names for group in groups):
        raise refuse(": a group without params", "expected: each trained parameter in one group")
    return tuple(groups)


# ---------------------------------------------------------------- lines
def read_line(
    path: Path, number: int, text: bytes, n_train: int | None, groups: int
) -> tuple[int, Line]:
    """Step and content of a line. `groups`: the number of named groups in the header."""

    def refuse(what: str, *details: str) -> TrajectoryError:
        return TrajectoryError(f"{path.name} line {number}: {what}", *details)

    try:
        entry = parse_sealed_json(text, finite=False)
    except ChangedText as error:
        raise refuse(str(error), CHANGED_LINE) from error
    except ValueError as error:
        raise refuse(
            f"not JSON ({error})", f"found: {text[:80].decode('utf-8', 'replace').rstrip()}"
        ) from error
    if not isinstance(entry, dict) or not {"step", "lr", "examples"} <= entry.keys():
        raise refuse("lacks step, lr or examples", f"expected: {EXAMPLE_LINE}")
    check_keys(entry, refuse)
    if not is_index(entry["step"]):
        raise refuse(f"step is {shown(entry['step'])}", "expected: a whole number from 0")
    rate = entry["lr"]
    check_rates(rate, groups, refuse)
    examples = entry["examples"]
    check_examples(examples, n_train, refuse)
    weights, clip, seed = entry.get("weights"), entry.get("clip", 1.0), entry.get("seed")
    check_weights(weights, len(examples), refuse)
    if not is_number(clip):
        raise refuse(
            f"clip is {shown(clip)}",
            "expected: the number from 0 that the gradient was multiplied by",
        )
    if seed is not None and not isinstance(seed, int):
        raise refuse(f"seed is {shown(seed)}", "expected: a whole number")
    return entry["step"], Line(
        tuple(map(float, rate)) if isinstance(rate, list) else float(rate),
        np.array(examples, dtype=np.int64),
        np.array(weights, dtype=np.float64) if weights is not None else None,
        float(clip),
        seed,
        read_training_mode(entry, len(examples), refuse),
    )


def check_keys(entry: Json, refuse: Refuse) -> None:
    """Refuse a misspelled key, which would be silently ignored. Other keys are the user's own."""
    for key in entry.keys() - LINE_KEYS:
        if meant := get_close_matches(key[:20].lower(), LINE_KEYS, 1, 0.8):
            raise refuse(f"has the key {key[:20]!r}", f"expected: {meant[0]}, or a name of yours")


def check_rates(rate: Any, groups: int, refuse: Refuse) -> None:  # Any: a JSON value
    if isinstance(rate, list) and len(rate) != groups:
        raise refuse(
            f"lr has {len(rate)} numbers, the header's `groups` {groups}",
            "expected: as many, in the same order",
        )
    rates = rate if isinstance(rate, list) else [rate]
    if not rates or not all(map(is_number, rates)):
        raise refuse(
            f"lr is {shown(rate)}",
            "expected: a finite number from 0, or a list with one per parameter group",
        )


def check_examples(examples: Any, n_train: int | None, refuse: Refuse) -> None:  # Any: JSON
    if not isinstance(examples, list) or not are_indices(examples):
        raise refuse("examples is not a list of example ids", f"expected: {EXAMPLE_LINE}")
    if n_train is not None and examples and max(examples) >= n_train:
        unknown = sorted({value for value in examples if value >= n_train})
        raise refuse(
            f"names unknown examples: {listed(unknown)}",
            f"train_data() has {n_train:,} examples (0 to {n_train - 1:,})",
            "the trajectory is of another run, or definition.py builds another training set",
        )


def check_weights(weights: Any, count: int, refuse: Refuse) -> None:  # Any: a JSON value
    fits = weights is None or (
        isinstance(weights, list) and len(weights) == count and all(map(is_number, weights))
    )
    if not fits:
        raise refuse(
            "weights do not fit examples", f"expected: a list of {count} finite numbers from 0"
        )


def is_index(value: Any) -> bool:  # Any: a JSON value
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def are_indices(values: list[Any]) -> bool:  # Any: JSON values
    """Whether `is_index` holds for all, in a fraction of the time."""
    if not values:
        return True
    return set(map(type, values)) == {int} and min(values) >= 0 and max(values) < 1 << 63


def is_number(value: Any) -> bool:  # Any: a JSON value
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
