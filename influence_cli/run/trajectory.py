"""trajectory.jsonl: what was trained on at each step, and at which step size. Written as training goes, so its end may be cut off."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from influence_cli.errors import TrajectoryError, listed

FORMAT = "influence-trajectory"
HEADER = f'expected: {{"format": "{FORMAT}", "version": 1, "reduction": "mean", "optimizer": {{"name": "sgd"}}}}'
LINE = 'expected: {"step": 0, "lr": 0.1, "examples": [17, 4, 256]}'


class Line(NamedTuple):
    """One optimizer step: the sum over its entries of weight x gradient, times `clip`, went to the optimizer."""

    lr: float | tuple[float, ...]  # one, or one per parameter group
    examples: np.ndarray  # (B,) ids; one that was there twice is two entries
    weights: np.ndarray | None  # (B,) float64; None: what the header's reduction says
    clip: float
    seed: int | None


@dataclass(frozen=True)
class Group:
    """Parameters that share options. `names`: none means all; `options`: torch's arguments of the optimizer, its defaults left out."""

    names: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Trajectory:
    """`lines[t]` is step t. `optimizer`: torch's name of it in small letters, None where the header does not say."""

    path: Path
    lines: tuple[Line, ...]
    reduction: str | None = None
    optimizer: str | None = None
    groups: tuple[Group, ...] = (Group((), {}),)
    notes: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int:
        """T, the number of steps: one past the last line's."""
        return len(self.lines)

    def rates(self, step: int) -> tuple[float, ...]:
        """The step size of each group."""
        rate = self.lines[step].lr
        return rate if isinstance(rate, tuple) else (rate,) * len(self.groups)

    def weights(self, step: int) -> np.ndarray:
        """(B,) w of each entry: the step's loss was sum of w x loss. Raises TrajectoryError where neither line nor header says."""
        line = self.lines[step]
        if line.weights is not None:
            return line.weights
        if self.reduction is None:
            raise TrajectoryError(
                f"{self.path.name}: step {step} has no weights, and the header no `reduction`",
                "expected: weights in each line, or in the header",
                '"reduction": "mean" (each entry weighs 1/|B|) or "sum" (each weighs 1)',
            )
        return np.full(
            len(line.examples), 1 / max(1, len(line.examples)) if self.reduction == "mean" else 1.0
        )

    def group_of(self, names: tuple[str, ...]) -> int | None:
        """The group of the parameter with these (tied) names; None where it is in none, so that it was never trained."""
        for number, group in enumerate(self.groups):
            if not group.names or set(names) & set(group.names):
                return number
        return None


def read_trajectory(path: Path, n_train: int | None) -> Trajectory:
    """Read and check a whole trajectory. `n_train`: size of the training set, to check the ids against.

    A last line without its end is dropped with a note (a crash costs one line); the later line of a step wins (a resume).
    Raises TrajectoryError naming the line: bad JSON, bad values, unknown examples, missing steps.
    """
    lines: dict[int, Line] = {}
    notes: list[str] = []
    try:
        with path.open("rb") as file:
            reduction, optimizer, groups = _header(path, next(file, b""))
            for number, text in enumerate(file, start=2):
                if not text.endswith(b"\n"):
                    try:
                        json.loads(text)
                    except ValueError:
                        notes.append(
                            f"{path.name} line {number} is cut off (a crash while it was written); left out"
                        )
                        continue
                step, line = _line(
                    path, number, text, n_train, sum(bool(group.names) for group in groups)
                )
                lines[step] = line
    except OSError as error:
        raise TrajectoryError(f"{path} can't be read: {error.strerror}") from error
    if not lines:
        raise TrajectoryError(
            f"{path.name} has a header and no step", "expected: one line per optimizer step"
        )
    missing = [step for step in range(max(lines) + 1) if step not in lines]
    if missing:
        raise TrajectoryError(
            f"{path.name} lacks steps: {listed(missing)}",
            f"it has {len(lines):,} of the steps 0 to {max(lines):,}",
            "every step needs its line",
        )
    return Trajectory(
        path,
        tuple(lines[step] for step in range(len(lines))),
        reduction,
        optimizer,
        groups,
        tuple(notes),
    )


def _header(path: Path, line: bytes) -> tuple[str | None, str | None, tuple[Group, ...]]:
    def bad(what: str, *more: str) -> TrajectoryError:
        return TrajectoryError(f"{path.name} line 1{what}", *more)

    try:
        header = json.loads(line)
    except ValueError as error:
        raise bad(f" is not a JSON object: {error}", HEADER) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise bad(" is not a trajectory header", HEADER)
    if header.get("version") != 1:
        raise TrajectoryError(
            f"{path.name} is a trajectory of version {header.get('version')!r}",
            "this influence reads version 1",
        )
    reduction, optimizer = header.get("reduction"), header.get("optimizer", {})
    if reduction not in (None, "mean", "sum"):
        raise bad(
            f": reduction is {reduction!r}", "expected: mean, sum, or none and weights in each line"
        )
    if not isinstance(optimizer, dict) or not isinstance(optimizer.get("name", ""), str):
        raise bad(
            f": optimizer is {optimizer!r}",
            'expected: {"name": "sgd", "momentum": 0.9}, with torch\'s argument names',
        )
    options = {key: value for key, value in optimizer.items() if key != "name"}
    groups = []
    try:
        for group in header.get("groups", []):
            names = tuple(str(name) for name in group["params"])
            groups.append(
                Group(
                    names, options | {key: value for key, value in group.items() if key != "params"}
                )
            )
    except (TypeError, KeyError):
        raise bad(
            ": `groups` can't be read",
            'expected: [{"params": ["head.weight", ...]}, ...], one per parameter group',
        ) from None
    twice = {
        name
        for group in groups
        for name in group.names
        if sum(name in other.names for other in groups) > 1
    }
    if twice or any(not group.names for group in groups):
        what = f": {listed(sorted(twice))} in two groups" if twice else ": a group without params"
        raise bad(what, "expected: each trained parameter in one group")
    return (
        reduction,
        optimizer["name"].lower() if "name" in optimizer else None,
        tuple(groups) or (Group((), options),),
    )


def _line(
    path: Path, number: int, text: bytes, n_train: int | None, groups: int
) -> tuple[int, Line]:
    def bad(what: str, *more: str) -> TrajectoryError:
        return TrajectoryError(f"{path.name} line {number}: {what}", *more)

    try:
        entry = json.loads(text)
    except ValueError as error:
        raise bad(
            f"not JSON ({error})", f"found: {text[:80].decode('utf-8', 'replace').rstrip()}"
        ) from error
    if not isinstance(entry, dict) or not {"step", "lr", "examples"} <= entry.keys():
        raise bad("lacks step, lr or examples", LINE)
    step, rate, examples = entry["step"], entry["lr"], entry["examples"]
    if not _is_index(step):
        raise bad(f"step is {step!r}", "expected: a whole number from 0")
    rates = rate if isinstance(rate, list) else [rate]
    if not rates or not all(_is_number(value) for value in rates):
        raise bad(
            f"lr is {rate!r}",
            "expected: a finite number from 0, or a list with one per parameter group",
        )
    if isinstance(rate, list) and len(rate) != groups:
        raise bad(
            f"lr has {len(rate)} numbers, the header's `groups` {groups}",
            "expected: as many, in the same order",
        )
    if not isinstance(examples, list) or not all(map(_is_index, examples)):
        raise bad("examples is not a list of example ids", LINE)
    if n_train is not None and examples and max(examples) >= n_train:
        unknown = sorted({value for value in examples if value >= n_train})
        raise bad(
            f"names examples that are not there: {listed(unknown)}",
            f"train_data() has {n_train:,} examples (0 to {n_train - 1:,})",
            "the trajectory is of another run, or definition.py builds another training set",
        )
    weights, clip, seed = entry.get("weights"), entry.get("clip", 1.0), entry.get("seed")
    if weights is not None and not (
        isinstance(weights, list)
        and len(weights) == len(examples)
        and all(map(_is_number, weights))
    ):
        raise bad(
            "weights do not fit examples",
            f"expected: a list of {len(examples)} finite numbers from 0",
        )
    if not _is_number(clip):
        raise bad(
            f"clip is {clip!r}", "expected: the number from 0 that the gradient was multiplied by"
        )
    if seed is not None and not isinstance(seed, int):
        raise bad(f"seed is {seed!r}", "expected: a whole number")
    line = Line(
        tuple(map(float, rate)) if isinstance(rate, list) else float(rate),
        np.array(examples, dtype=np.int64),
        np.array(weights, dtype=np.float64) if weights is not None else None,
        float(clip),
        seed,
    )
    return step, line


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
