"""Mutated inputs, each through the function that parses it.

An input is accepted and right, refused cleanly (InfluenceError), or a fault: a traceback, a hang,
or a silent difference from an independent reading.
"""

import csv
import io
import json
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from faults.mutate import mutate_bytes, random_text, strict_json
from faults.tally import Clock, Tally
from influence_cli.cli import specs
from influence_cli.errors import InfluenceError
from influence_cli.gradients.quantity import checked
from influence_cli.output.columns import SCORE_COLUMNS
from influence_cli.output.formats import read_rows, write_rows
from influence_cli.output.merge import merge_tables, open_tables
from influence_cli.output.terminal import print_rows
from influence_cli.parallel.shards import parse_shard
from influence_cli.run.checkpoints import list_shards
from influence_cli.run.trajectory_reader import read_header_line, read_line
from influence_cli.storage.atomic import replace_text_file
from influence_cli.storage.safetensors_io import read_head

HANG = 2.0  # seconds
SIZE = 100  # examples of the data set that specs refer to
WEIGHT = {"safetensors header": 20, "trajectory line": 20, "spec of ids": 20, "shard": 10}


class SilentFault(Exception):
    """An input was accepted, and read as something that it does not say."""


def expect(holds: bool, cause: str) -> None:
    if not holds:
        raise SilentFault(cause)


@dataclass(frozen=True)
class Target:
    """`make` draws an input; `parse` reads it, and raises SilentFault where it reads it wrongly."""

    name: str
    make: Callable[[random.Random], Any]  # Any: the input of `parse`
    parse: Callable[[Any], None]
    refusals: tuple[type[Exception], ...] = (InfluenceError,)


# ---------------------------------------------------------------- files
HEADER = (
    b'{"__metadata__":{"step":"10","learning_rate":"0.1"},'
    b'"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
    b'"b":{"dtype":"I64","shape":[2],"data_offsets":[24,40]},'
    b'"c":{"dtype":"BF16","shape":[4],"data_offsets":[40,48]}}'
)
BODY = bytes(48)


def parse_header(text: bytes) -> None:
    _, entries = read_head(text, 8 + len(text), 8 + len(text) + len(BODY))
    try:
        reference = safetensors.deserialize(len(text).to_bytes(8, "little") + text + BODY)
    except Exception as error:
        raise SilentFault(f"safetensors refuses: {str(error)[:40]}") from error
    expect({name for name, _ in reference} == set(entries), "other tensor names")
    for name, entry in reference:
        expect(tuple(entry["shape"]) == entries[name].shape, "another shape")


LINE = b'{"step": 3, "lr": [0.1, 0.2], "examples": [17, 4, 25], "weights": [0.5, 1, 2], "clip": 0.7, "seed": 5}\n'
TRAJECTORY_HEADER = (
    b'{"format": "influence-trajectory", "version": 1, "reduction": "mean", "optimizer": '
    b'{"name": "sgd", "momentum": 0.9}, "groups": [{"params": ["a", "b"]}, {"params": ["c"]}]}\n'
)


def parse_line(text: bytes) -> None:
    step, line = read_line(Path("trajectory.jsonl"), 2, text, SIZE, 2)
    try:
        entry = strict_json(text, finite=False)  # a user's own key may hold NaN
    except ValueError as error:
        raise SilentFault(f"a strict parser refuses: {type(error).__name__}") from error
    expect(step == entry["step"], "another step")
    expect(line.examples.tolist() == entry["examples"], "other examples")


def parse_trajectory_header(text: bytes) -> None:
    read_header_line(Path("trajectory.jsonl"), text)
    try:
        strict_json(text)
    except ValueError as error:
        raise SilentFault(f"a strict parser refuses: {type(error).__name__}") from error


def make_index_target(folder: Path) -> Target:
    for name in ("m-1.safetensors", "m-2.safetensors"):
        header = HEADER if name == "m-1.safetensors" else HEADER.replace(b'"a"', b'"d"')
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + BODY)
    index = b'{"metadata": {"total_size": 96}, "weight_map": {"a": "m-1.safetensors", "d": "m-2.safetensors"}}'

    def parse(text: bytes) -> None:
        (folder / "model.safetensors.index.json").write_bytes(text)
        for file in list_shards(folder):
            expect(file.resolve().parent == folder.resolve(), "a shard outside the folder")

    return Target("index file", lambda rng: mutate_bytes(index, rng), parse)


# ---------------------------------------------------------------- flags
def make_spec(rng: random.Random) -> str:
    part = lambda: rng.choice(("", "0", "5", "99", "100", "007", "9" * 30, "٣", "²", "1_0", "+1"))  # noqa: E731
    spec = ",".join(
        rng.choice((part, lambda: f"{part()}:{part()}"))() for _ in range(rng.randint(1, 3))
    )
    if rng.random() < 0.3:
        spec = mutate_bytes(spec.encode(), rng).decode("utf-8", "replace").replace("\x00", "0")
    return "9" * 5000 if rng.random() < 1e-4 else spec


def parse_ids(spec: str) -> None:
    ids = specs.ids("--queries", spec, SIZE, "query", io.StringIO("3 4"))
    expect(all(0 <= index < SIZE for index in ids), "an id out of range")
    if spec.isascii() and not set(spec) - set("0123456789:,"):
        expected: set[int] = set()
        for part in filter(None, spec.split(",")):
            low, colon, high = part.partition(":")
            stop = int(low) + 1 if not colon else int(high or SIZE)
            expected |= set(range(int(low or 0), stop))
        expect(sorted(expected) == list(ids), "other ids")


def parse_shard_spec(spec: str) -> None:
    shard = parse_shard(spec, {})
    expect(1 <= shard.index <= shard.count, "no such shard")


def make_group_target(path: Path) -> Target:
    valid = "".join(f"group {number % 3}\n" for number in range(5)).encode()

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        names = specs.group_file(path, 5)
        lines = io.StringIO(text.decode(), newline=None).read().split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        expect([line.strip() for line in lines] == names, "other lines")

    return Target("group file", lambda rng: mutate_bytes(valid, rng), parse)


# ---------------------------------------------------------------- tables
PART = (
    ",".join(SCORE_COLUMNS) + "\n0,proponent,1,4,2.5,a,b,x,y\n0,proponent,2,3,1.5,a,b,x,y\n"
    "0,opponent,1,7,-2.5,a,b,x,y\n1,proponent,1,4,0.5,a,b,x,y\n"
).encode()


def make_merge_target(folder: Path) -> Target:
    one, two = folder / "part-1.csv", folder / "part-2.csv"
    two.write_bytes(PART.replace(b",4,", b",14,").replace(b",3,", b",13,").replace(b",7,", b",17,"))

    def parse(text: bytes) -> None:
        one.write_bytes(text)
        tables, columns = open_tables([str(one), str(two)], io.StringIO())
        rows = list(merge_tables(tables, columns, None))
        for row in rows:
            expect(float(row[columns.index("score")]) not in (float("inf"),), "an infinite score")
        sections = [(row[0], row[1]) for row in rows]
        expect(len(dict.fromkeys(sections)) == sum(
            1 for at, key in enumerate(sections) if not at or sections[at - 1] != key
        ), "sections are mixed")  # fmt: skip

    return Target("merge part", lambda rng: mutate_bytes(PART, rng), parse)


def make_row(rng: random.Random) -> list[tuple]:
    # TableWriter escapes lone surrogates: write_rows alone can not encode them
    texts = [random_text(rng).encode("utf-8", "backslashreplace").decode() for _ in range(4)]
    return [(0, "proponent", 1, 4, rng.uniform(-1, 1), *texts)]


def make_writer_target(format: str, folder: Path) -> Target:
    path = folder / f"table.{format}"

    def parse(rows: list[tuple]) -> None:
        with replace_text_file(path) as file:
            write_rows(rows, SCORE_COLUMNS, format, file)
        with path.open(encoding="utf-8", newline="") as file:
            if format == "jsonl":
                content = [list(json.loads(line).values()) for line in file.read().split("\n")[:-1]]
            else:
                content = list(csv.reader(file, delimiter="," if format == "csv" else "\t"))[1:]
        wanted = [[str(cell) for cell in row] for row in rows]
        expect([[str(cell) for cell in row] for row in content] == wanted, "read back otherwise")
        own = [cells for _, cells in read_rows(str(path), io.StringIO())][1:]
        expect([[str(cell) for cell in row] for row in own] == wanted, "our reader differs")

    return Target(f"texts to {format}", make_row, parse)


def parse_terminal(rows: list[tuple]) -> None:
    file = io.StringIO()
    print_rows(rows, SCORE_COLUMNS, file)
    for character in file.getvalue():
        code = ord(character)
        safe = character == "\n" or (code >= 32 and not 127 <= code < 160)
        expect(safe and character not in "\u202e\u2066\u2028\u2029", f"prints U+{code:04X}")


# ---------------------------------------------------------------- definitions
def make_losses(rng: random.Random) -> Any:  # Any: what a user's function may return
    shape = rng.choice(((), (4,), (3,), (4, 1), (0,), (1, 4), (5,)))
    dtype = rng.choice((torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64))
    tensor = torch.zeros(shape, dtype=dtype)
    if dtype.is_floating_point and rng.random() < 0.7:
        tensor.requires_grad_()
    return rng.choice((tensor, tensor, tensor, tensor, None, 1.0, [tensor], (tensor,), "x"))


def parse_losses(losses: Any) -> None:
    value = checked("loss", losses, 4)
    expect(tuple(value.shape) == (4,) and value.is_floating_point(), "a wrong shape or dtype")
    expect(value.requires_grad, "not differentiable")


def make_targets(folder: Path) -> list[Target]:
    def mutated(content: bytes) -> Callable[[random.Random], bytes]:
        return lambda rng: mutate_bytes(content, rng)

    header = Target(
        "safetensors header", mutated(HEADER), parse_header, (InfluenceError, ValueError)
    )
    return [
        header,
        Target("trajectory line", mutated(LINE), parse_line),
        Target("trajectory header", mutated(TRAJECTORY_HEADER), parse_trajectory_header),
        Target("spec of ids", make_spec, parse_ids),
        Target("shard", lambda rng: make_spec(rng).replace(":", "/"), parse_shard_spec),
        Target("losses of a definition", make_losses, parse_losses),
        make_index_target(folder),
        make_group_target(folder / "groups.txt"),
        make_merge_target(folder),
        *(make_writer_target(format, folder) for format in ("csv", "tsv", "jsonl")),
        Target("texts to a terminal", make_row, parse_terminal),
    ]


def try_input(target: Target, value: object, tally: Tally) -> None:
    start = time.perf_counter()
    try:
        target.parse(value)
    except SilentFault as fault:
        tally.fault("silent", str(fault), repr(value))
    except target.refusals:
        tally.refused += 1
    except Exception as error:
        tally.crash(error, repr(value))
    if time.perf_counter() - start > HANG:
        tally.fault("hang", f"longer than {HANG} s", repr(value))
    tally.tried += 1


def run_inputs(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """About `count` inputs in at most `seconds`; more of those whose parser is fast."""
    clock = Clock(seconds)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        targets = make_targets(Path(name))
        total = sum(WEIGHT.get(target.name, 1) for target in targets)
        tallies = []
        for target in targets:
            tally = Tally(f"inputs: {target.name}")
            rng = random.Random(f"{seed} {target.name}")
            tally.target = share = count * WEIGHT.get(target.name, 1) // total
            part = Clock(seconds * WEIGHT.get(target.name, 1) / total + 1)
            while tally.tried < share and not part.is_over and not clock.is_over:
                try_input(target, target.make(rng), tally)
            tally.seconds = part.seconds
            tallies.append(tally)
    return tallies
