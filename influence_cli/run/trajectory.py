"""trajectory.jsonl: what was trained on at each step, and at which step size. Written as training goes, so its end may be cut off."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from influence_cli.errors import TrajectoryError, listed

FORMAT = "influence-trajectory"


@dataclass(frozen=True)
class Trajectory:
    """Step sizes by step: one number, or one per parameter group of `groups` (their parameter names)."""

    path: Path
    lr: dict[int, float | tuple[float, ...]]
    groups: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int:
        """T, the number of steps: one past the last line's."""
        return max(self.lr) + 1


def read(path: Path, n_train: int | None) -> Trajectory:
    """Read and check a whole trajectory. `n_train`: size of the training set, to check the ids against.

    A last line without its end is dropped with a note (a crash costs one line); the later line of a step wins (a resume).
    Raises TrajectoryError naming the line: bad JSON, bad values, unknown examples, missing steps.
    """
    lr: dict[int, float | tuple[float, ...]] = {}
    notes: list[str] = []
    try:
        with path.open("rb") as lines:
            groups = _header(path, next(lines, b""))
            for number, line in enumerate(lines, start=2):
                if not line.endswith(b"\n"):
                    try:
                        json.loads(line)
                    except ValueError:
                        notes.append(f"{path.name} line {number} is cut off (a crash while it was written); left out")
                        continue
                step, rate = _line(path, number, line, n_train, len(groups))
                lr[step] = rate
    except OSError as error:
        raise TrajectoryError(f"{path} can't be read: {error.strerror}") from error
    if not lr:
        raise TrajectoryError(f"{path.name} has a header and no step", "expected: one line per optimizer step")
    missing = [step for step in range(max(lr) + 1) if step not in lr]
    if missing:
        raise TrajectoryError(
            f"{path.name} lacks steps: {listed(missing)}", f"it has {len(lr):,} of the steps 0 to {max(lr):,}", "every step needs its line"
        )
    return Trajectory(path, lr, groups, tuple(notes))


def _header(path: Path, line: bytes) -> tuple[tuple[str, ...], ...]:
    expected = f'expected: {{"format": "{FORMAT}", "version": 1, "reduction": "mean", "optimizer": {{"name": "sgd"}}}}'
    try:
        header = json.loads(line)
    except ValueError as error:
        raise TrajectoryError(f"{path.name} line 1 is not a JSON object: {error}", expected) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise TrajectoryError(f"{path.name} line 1 is not a trajectory header", expected)
    if header.get("version") != 1:
        raise TrajectoryError(f"{path.name} is a trajectory of version {header.get('version')!r}", "this influence reads version 1")
    groups = header.get("groups", [])
    try:
        return tuple(tuple(str(name) for name in group["params"]) for group in groups)
    except (TypeError, KeyError):
        raise TrajectoryError(
            f"{path.name} line 1: `groups` can't be read", 'expected: [{"params": ["head.weight", ...], ...}, ...], one per parameter group'
        ) from None


def _line(path: Path, number: int, line: bytes, n_train: int | None, groups: int) -> tuple[int, float | tuple[float, ...]]:
    def bad(what: str, *more: str) -> TrajectoryError:
        return TrajectoryError(f"{path.name} line {number}: {what}", *more)

    try:
        entry = json.loads(line)
    except ValueError as error:
        raise bad(f"not JSON ({error})", f"found: {line[:80].decode('utf-8', 'replace').rstrip()}") from error
    expected = 'expected: {"step": 0, "lr": 0.1, "examples": [17, 4, 256]}'
    if not isinstance(entry, dict) or not {"step", "lr", "examples"} <= entry.keys():
        raise bad("lacks step, lr or examples", expected)
    step, rate, examples = entry["step"], entry["lr"], entry["examples"]
    if not _is_index(step):
        raise bad(f"step is {step!r}", "expected: a whole number from 0")
    rates = rate if isinstance(rate, list) else [rate]
    if not rates or not all(isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf for value in rates):
        raise bad(f"lr is {rate!r}", "expected: a finite number from 0, or a list with one per parameter group")
    if isinstance(rate, list) and len(rate) != groups:
        raise bad(f"lr has {len(rate)} numbers, the header's `groups` {groups}", "expected: as many, in the same order")
    if not isinstance(examples, list) or not all(_is_index(value) for value in examples):
        raise bad("examples is not a list of example ids", expected)
    if n_train is not None and examples and max(examples) >= n_train:
        unknown = sorted({value for value in examples if value >= n_train})
        raise bad(
            f"names examples that are not there: {listed(unknown)}",
            f"train_data() has {n_train:,} examples (0 to {n_train - 1:,})",
            "the trajectory is of another run, or definition.py builds another training set",
        )
    return step, tuple(map(float, rate)) if isinstance(rate, list) else float(rate)


def _is_index(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
