"""Trajectories: single lines, headers, whole files; and the numbers that a recorder is given."""

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from faults.inputs.target import SilentFault, Target, expect
from faults.mutate import extreme_values, mutate_bytes, strict_json
from faults.strategies import broken_json, json_texts
from influence_cli.run.recorded_entries import read_entries, read_integers, read_number
from influence_cli.run.trajectory_reader import read_header_line, read_line, read_trajectory

SIZE = 100  # examples of the data set
LINE = (
    b'{"step": 3, "lr": [0.1, 0.2], "examples": [17, 4, 25], "weights": [0.5, 1, 2], '
    b'"clip": 0.7, "seed": 5}\n'
)
HEADER = (
    b'{"format": "influence-trajectory", "version": 1, "reduction": "mean", "optimizer": '
    b'{"name": "sgd", "momentum": 0.9}, "groups": [{"params": ["a", "b"]}, {"params": ["c"]}]}\n'
)


def read_strictly(text: bytes, finite: bool) -> Any:  # Any: a JSON value
    try:
        return strict_json(text, finite=finite)
    except ValueError as error:
        raise SilentFault(f"a strict parser refuses: {type(error).__name__}") from error


def parse_line(text: bytes) -> None:
    step, line = read_line(Path("trajectory.jsonl"), 2, text, SIZE, 2)
    entry = read_strictly(text, finite=False)  # a user's own key may hold NaN
    expect(step == entry["step"], "another step")
    expect(line.examples.tolist() == entry["examples"], "other examples")
    expect(line.clip == float(entry.get("clip", 1.0)), "another clip")
    expect(np.array_equal(np.asarray(line.lr), np.asarray(entry["lr"])), "another rate")
    weights = None if line.weights is None else line.weights.tolist()
    written = entry.get("weights")
    expect(
        weights == (written and list(map(float, written))) or weights == written, "other weights"
    )


def parse_header(text: bytes) -> None:
    header = read_header_line(Path("trajectory.jsonl"), text)
    content = read_strictly(text, finite=True)
    expect(header.reduction == content.get("reduction"), "another reduction")
    names = [list(group.names) for group in header.named_groups]
    written = [[str(name) for name in group["params"]] for group in content.get("groups", [])]
    expect(names == written, "other groups")


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    count = draw(st.integers(0, 4))
    rates = st.sampled_from((0, 0.1, 1, 5e-324, 1e308))
    entry: dict[str, Any] = {  # Any: JSON values
        "step": draw(st.sampled_from((0, 1, 2**53 + 1, 2**63 - 1, 2**63))),
        "lr": draw(st.one_of(rates, st.lists(rates, min_size=2, max_size=2))),
        "examples": draw(st.lists(st.integers(0, SIZE), min_size=count, max_size=count)),
    }
    if draw(st.booleans()):
        entry["weights"] = draw(st.lists(rates, min_size=count, max_size=count))
    if draw(st.booleans()):
        entry["clip"] = draw(st.floats(0, 1))
    if draw(st.booleans()):
        entry[draw(st.text(max_size=8))] = draw(st.integers())
    return draw(broken_json(entry)) + b"\n"


# ---------------------------------------------------------------- whole files
def make_file_target(folder: Path) -> Target:
    """A file of five steps. The later of two lines of a step counts; a cut last line is left
    out."""
    path = folder / "trajectory.jsonl"
    head = json.dumps({"format": "influence-trajectory", "version": 1, "reduction": "sum"})
    entries = [{"step": step, "lr": 0.1 / (step + 1), "examples": [step, 7]} for step in range(5)]
    content = "".join(f"{line}\n" for line in (head, *map(json.dumps, entries))).encode()

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        trajectory = read_trajectory(path, SIZE)
        wanted: dict[int, Any] = {}
        for line in text.split(b"\n")[1:]:
            try:
                entry = strict_json(line, finite=False) if line else None
            except ValueError:
                expect(text.endswith(line), "a broken line was left out")
                entry = None
            if entry is not None:
                wanted[entry["step"]] = entry
        expect(sorted(wanted) == list(range(trajectory.steps)), "other steps")
        for step, entry in wanted.items():
            expect(trajectory.lines[step].examples.tolist() == entry["examples"], "other examples")
            expect(trajectory.lines[step].lr == entry["lr"], "another rate")

    def make(rng: random.Random) -> bytes:
        if rng.random() < 0.5:
            return mutate_bytes(content, rng)
        parts = content.splitlines(keepends=True)
        chosen = [parts[0], *(rng.choice(parts[1:]) for _ in range(rng.randint(0, 9)))]
        return b"".join(chosen)[: rng.choice((None, -1, -5))]

    return Target("trajectory file", make, parse, 15, extremes=partial(extreme_values, content))


# ---------------------------------------------------------------- the recorder
ODD_NUMBERS: tuple[Any, ...] = (  # Any: what a training loop may give
    0, 1, -1, 2**63, 10**400, 1.0, 0.5, math.nan, math.inf, True, None, "1", "9" * 5000, b"1", 1j,
    np.int64(3), np.float32(2), np.bool_(True), np.array(2), np.array([1.0]), torch.tensor(3),
    torch.tensor([4]), torch.tensor(1.5), torch.tensor(True), [], [1], object(),
)  # fmt: skip


def make_recorded(rng: random.Random) -> Any:
    numbers: Any = [
        rng.choice((1, 2, 3, rng.choice(ODD_NUMBERS))) for _ in range(rng.randint(0, 3))
    ]
    kind = rng.random()
    if kind < 0.2:
        shape = rng.choice(((2,), (0,), (1, 2), ()))
        dtype = rng.choice((torch.int64, torch.uint8, torch.float32, torch.bool, torch.complex64))
        numbers = torch.zeros(shape, dtype=dtype)
    elif kind < 0.3:
        numbers = rng.choice(ODD_NUMBERS)
    weights: Any = rng.choice(
        (None, [0.5, 1.0], [rng.choice(ODD_NUMBERS)], rng.choice(ODD_NUMBERS))
    )
    return numbers, weights, rng.choice(ODD_NUMBERS), rng.choice(ODD_NUMBERS)


def parse_recorded(values: Any) -> None:  # Any: see make_recorded
    indices, weights, clip, seed = values
    ids, factors = read_entries(indices, weights)
    expect(all(type(index) is int and index >= 0 for index in ids), "an id that is no index")
    given = indices.tolist() if isinstance(indices, torch.Tensor | np.ndarray) else list(indices)
    expect([int(index) for index in given] == ids, "other ids")
    expect(factors is None or all(0 <= value < math.inf for value in factors), "a weight")
    expect(0 <= read_number("clip", clip) < math.inf, "a clip that is no factor")
    number = read_integers("seed", [seed])[0]
    line = json.dumps({"step": 0, "lr": 0.1, "examples": ids, "seed": number}).encode()
    read_line(Path("recorded"), 2, line, None, 1)


def make_targets(folder: Path) -> list[Target]:
    return [
        Target(
            "trajectory line", lambda rng: mutate_bytes(LINE, rng), parse_line, 180,
            extremes=partial(extreme_values, LINE), strategy=lines(),
        ),
        Target(
            "trajectory header", lambda rng: mutate_bytes(HEADER, rng), parse_header, 60,
            extremes=partial(extreme_values, HEADER), strategy=json_texts(HEADER),
        ),
        make_file_target(folder),
        Target("numbers for a recorder", make_recorded, parse_recorded, 40),
    ]  # fmt: skip
