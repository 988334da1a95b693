"""Samples of each kind of input through the command line itself.

A command must end with exit 0 and the right table, or with exit 1 or 2 and one message. A table is
right if its scores are those of products that were computed without the input, weighed and ranked
by the few lines below.
"""

import csv
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from faults.forks import build_run
from faults.inputs import flags, headers, merge_parts
from faults.inputs.definition_texts import Written, judge_definition, make_definition
from faults.inputs.tables import ACTING
from faults.inputs.target import CommandFault, Refused, Target, expect
from faults.mutate import extreme_values, mutate_bytes, strict_json
from faults.session import Outcome, Snapshot, run_inside

TRAIN, QUERIES, STEPS, RATE = 40, 6, (10, 20, 30), 0.1
SCORE = ("score", "run", "-o", "table.csv")
TOLERANCE = 1e-5  # of the largest product: sums of float32 numbers
Products = dict[tuple[int, int, int], float]  # (step, query, train) -> product of gradients


def judge_end(outcome: Outcome) -> None:
    """Raises Refused for a clean refusal, CommandFault for another end than allowed."""
    lines = outcome.err.splitlines()
    if outcome.has_fault or outcome.code not in (0, 1, 2):
        raise CommandFault(f"exit {outcome.code}: {(lines or [''])[-1][:80]}")
    bad = ACTING & set(outcome.err) - set("\n\t")
    expect(not bad, f"prints U+{ord(min(bad, default=chr(0))):04X}")
    messages = [line for line in lines if line.startswith(("error: ", "Usage: "))]
    if outcome.code:
        if len(messages) != 1 or len(outcome.err) > 20_000:
            raise CommandFault(f"exit {outcome.code} with {len(messages)} messages")
        raise Refused(messages[0])
    expect(not messages, "exit 0 with an error")


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class CommandTrials:
    """A warm run in a folder that is restored after each sample."""

    place: Path
    snapshot: Snapshot
    products: Products
    plain: bytes  # the table of SCORE

    @classmethod
    def open(cls, folder: Path) -> "CommandTrials":
        place = folder / "place"
        build_run(place / "run", STEPS)
        products: Products = {}
        every = ("--by", "checkpoint", "--lr-weights", "none", "--top", "all")
        for arguments in ((*SCORE, *every), SCORE):
            if run_inside(arguments, place).code:
                raise RuntimeError(f"{' '.join(arguments)} fails undisturbed")
            if not products:
                for row in read_table(place / "table.csv"):
                    key = (int(row["checkpoint"]), int(row["query"]), int(row["train"]))
                    products[key] = float(row["score"])
        plain = (place / "table.csv").read_bytes()
        return cls(place, Snapshot(place, folder / "copy"), products, plain)

    def run(self, *arguments: str) -> list[dict[str, str]]:
        """The rows of table.csv. Raises Refused."""
        try:
            judge_end(run_inside(arguments, self.place))
            return read_table(self.place / "table.csv")
        finally:
            self.snapshot.restore()

    def run_with(self, files: dict[str, bytes], *arguments: str) -> list[dict[str, str]]:
        for name, content in files.items():
            path = self.place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return self.run(*arguments)

    def expect_scores(
        self,
        rows: list[dict[str, str]],
        rates: dict[int, float],
        queries: set[int] = set(range(QUERIES)),  # noqa: B006  # read only
        train: set[int] = set(range(TRAIN)),  # noqa: B006
        top: int = 10,
    ) -> None:
        """The rows are the `top` of each query and kind. `rates`: weight of each checkpoint."""
        scale = max(map(abs, self.products.values())) * max(map(abs, rates.values()), default=0)
        scores = {
            (q, n): sum(rate * self.products[step, q, n] for step, rate in rates.items())
            for q in queries
            for n in train
        }
        for row in rows:
            key = (int(row["query"]), int(row["train"]))
            expect(key in scores, "a pair that was not asked for")
            expect(abs(float(row["score"]) - scores[key]) <= TOLERANCE * scale, "another score")
        for query in queries:
            for kind, sign in (("proponent", 1), ("opponent", -1)):
                table_scores = [
                    sign * float(row["score"])
                    for row in rows
                    if (int(row["query"]), row["kind"]) == (query, kind)
                ]
                best = sorted((sign * scores[query, n] for n in train), reverse=True)[:top]
                best = [score for score in best if score > 0]
                close = (
                    len(table_scores) == len(best)
                    or min(map(abs, best), default=0) < TOLERANCE * scale
                )
                expect(close, "more or fewer rows")
                pairs = zip(table_scores, best, strict=False)
                expect(all(abs(a - b) <= TOLERANCE * scale for a, b in pairs), "another ranking")


# ---------------------------------------------------------------- flags
def make_flags(rng: random.Random) -> dict[str, str]:
    spec = (
        "0",
        "1",
        "5",
        "2,0",
        "0:3",
        ":2",
        "4:",
        "39",
        "40",
        "6",
        "9" * 5000,
        flags.make_spec(rng),
    )
    values = {
        "--queries": spec, "--train": spec, "--steps": ("10", "20", "10,30", "20:", *spec[-3:]),
        "--top": ("1", "3", "all", "0", "-1", "x", "9" * 5000), "--lr": ("1", "0.5", "1e-300", "0", "nan", "1e400", "x"),
        "--seed": ("0", "-1", "9" * 5000), "--batch-size": ("auto", "1", "7", "0", "1e3"),
        "--format": ("csv", "jsonl", "x\x1b[31m"), "--device": ("cpu", "\u202e"), "--layers": ("*", "0", "!*", "[", "\x9b"),
    }  # fmt: skip
    names = rng.sample(sorted(values), rng.choice((1, 1, 2, 3)))
    return {name: rng.choice(values[name]) for name in names}


def parse_flags(trials: CommandTrials, given: dict[str, str]) -> None:
    arguments = [
        part for name, value in given.items() for part in (name, value) if "\x00" not in value
    ]
    rows = trials.run(*SCORE, *arguments)
    if given.keys() & {"--layers", "--format"}:
        return
    numbers = {}
    for name, size in (("--queries", QUERIES), ("--train", TRAIN), ("--steps", max(STEPS) + 1)):
        spec = given.get(name, ":")
        if set(spec) - flags.PLAIN:
            return
        numbers[name] = flags.numbers_of(spec, size)
    rate = float(given.get("--lr", RATE))
    rates = {step: rate for step in STEPS if step in numbers["--steps"]}
    top = TRAIN if given.get("--top") == "all" else int(given.get("--top", "10")[:9])
    if top == TRAIN and "--top" in given:
        rows = [row for row in rows if float(row["score"]) != 0]
    trials.expect_scores(rows, rates, numbers["--queries"], numbers["--train"], top)


# ---------------------------------------------------------------- files of a run
def make_trajectory(rng: random.Random) -> bytes:
    head = b'{"format": "influence-trajectory", "version": 1, "reduction": "mean", "optimizer": {"name": "sgd"}}\n'
    lines = [
        json.dumps({"step": step, "lr": 0.01 * (step + 1), "examples": [step]}).encode() + b"\n"
        for step in range(30)
    ]
    if rng.random() < 0.5:  # valid: other rates, and lines of a step that come again
        lines += [lines[10].replace(b"0.11", b"0.5"), lines[20]][: rng.randrange(3)]
        lines[10] = lines[10].replace(b"0.11", rng.choice((b"0.25", b"1e-300", b"3")))
        return head + b"".join(lines)
    at = rng.choice((0, 1, 11, 21, 30))  # the header, or a line that a checkpoint uses
    parts = [head, *lines]
    parts[at] = mutate_bytes(parts[at], rng)
    return b"".join(parts)


def parse_trajectory(trials: CommandTrials, text: bytes) -> None:
    rows = trials.run_with({"run/trajectory.jsonl": text}, *SCORE)
    entries: dict[int, Any] = {}  # Any: JSON values
    for line in text.split(b"\n")[1:]:
        try:
            entry = strict_json(line, finite=False) if line else None
        except ValueError:
            expect(text.endswith(line), "a broken line was left out")
            continue
        if entry is not None:
            entries[entry["step"]] = entry
    last = max(entries)
    trials.expect_scores(rows, {step: float(entries[min(step, last)]["lr"]) for step in STEPS})


def parse_trainer_state(trials: CommandTrials, text: bytes) -> None:
    """The second checkpoint as a folder of a Hugging Face Trainer, without a rate of its own."""
    weights = (trials.place / "run/checkpoints/step-000020.safetensors").read_bytes()
    length = int.from_bytes(weights[:8], "little")
    head = json.loads(weights[8 : 8 + length])
    head["__metadata__"] = {"format": "pt"}
    plain = json.dumps(head).encode()
    folder = "run/checkpoints/checkpoint-20"
    (trials.place / "run/checkpoints/step-000020.safetensors").unlink()
    files = {
        f"{folder}/model.safetensors": len(plain).to_bytes(8, "little")
        + plain
        + weights[8 + length :],
        f"{folder}/trainer_state.json": text,
    }
    rows = trials.run_with(files, *SCORE)
    log = strict_json(text, finite=False)["log_history"]
    logged = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    step = max((step for step in logged if float(step) <= 20), key=float)
    trials.expect_scores(rows, {10: RATE, 20: float(logged[step]), 30: RATE})


def make_header(rng: random.Random) -> bytes:
    """The header of a checkpoint, of two layers."""
    model = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": span}
        for name, shape, span in (
            ("0.bias", [5], [0, 20]), ("0.weight", [5, 4], [20, 100]), ("2.bias", [3], [100, 112]),
            ("2.weight", [3, 5], [112, 172]),
        )
    }  # fmt: skip
    metadata = {"step": "10", "learning_rate": rng.choice(("0.1", "3", "1e-3"))}
    return mutate_bytes(json.dumps({"__metadata__": metadata, **model}).encode(), rng)


def parse_header(trials: CommandTrials, text: bytes) -> None:
    """The first checkpoint with another header; its tensors, where they are the same."""
    name = "run/checkpoints/step-000010.safetensors"
    content = (trials.place / name).read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    written = len(text).to_bytes(8, "little") + text + body
    rows = trials.run_with({name: written}, *SCORE)
    before, after = load(content), load(written)
    if all(torch.equal(before[key], after[key]) for key in before):
        rate = float(strict_json(text)["__metadata__"]["learning_rate"])
        trials.expect_scores(rows, {10: rate, 20: RATE, 30: RATE})


CACHE_FILES = ("cache.json", "checkpoints.json", "sizes-train.json", "columns.json")


def make_cache_file(rng: random.Random) -> tuple[str, int]:
    return rng.choice(CACHE_FILES), rng.randrange(1 << 30)


def parse_cache_file(trials: CommandTrials, drawn: tuple[str, int]) -> None:
    """A damaged cache file is refused, or gives the same table."""
    name, number = drawn
    path = next(iter(sorted((trials.place / "run/.influence").rglob(name))))
    text = mutate_bytes(path.read_bytes(), random.Random(number))
    rows = trials.run_with({str(path.relative_to(trials.place)): text}, *SCORE)
    trials.expect_scores(rows, dict.fromkeys(STEPS, RATE))


def parse_groups(trials: CommandTrials, text: bytes) -> None:
    rows = trials.run_with({"groups.txt": text}, *SCORE, "--group-by", "groups.txt", "--top", "all")
    names = [
        line.strip() for line in text.decode().replace("\r\n", "\n").replace("\r", "\n").split("\n")
    ]
    for row in rows:
        members = [n for n in range(TRAIN) if names[n] == row["train"]]
        total = sum(
            RATE * trials.products[step, int(row["query"]), n] for step in STEPS for n in members
        )
        expect(math.isclose(float(row["score"]), total, rel_tol=1e-3, abs_tol=1e-4), "another sum")


@cache
def encoded_part(format: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return merge_parts.encode(merge_parts.ROWS, format, Path(folder))


def make_part(rng: random.Random) -> tuple[str, bytes]:
    format = rng.choice(("csv", "tsv", "jsonl", "parquet"))
    return format, mutate_bytes(encoded_part(format), rng)


def parse_part(trials: CommandTrials, drawn: tuple[str, bytes]) -> None:
    format, text = drawn
    other = trials.place.parent / "part-2.csv"
    files = {f"part-1.{format}": text, "part-2.csv": other.read_bytes()}
    merge = ("merge", f"part-1.{format}", "part-2.csv", "--top", "all", "-o", "table.csv")
    rows: list[dict[str, Any]] = list(trials.run_with(files, *merge))  # Any: cells
    for row in rows:
        row |= {"rank": int(row["rank"]), "train": int(row["train"]), "score": float(row["score"])}
    merge_parts.check_merged(rows)
    if format != "parquet":
        merge_parts.compare_rows(rows, merge_parts.read_strictly(text, format))


def parse_definition(trials: CommandTrials, written: Written) -> None:
    rows = trials.run_with({"run/definition.py": written.text.encode()}, *SCORE, "--cache", "none")
    judge_definition(written, rows)


# ---------------------------------------------------------------- all
GROUPS = "".join(f"group {number % 3}\n" for number in range(TRAIN)).encode()
Case = tuple[Callable[[random.Random], Any], Callable[[CommandTrials, Any], None]]
CASES: dict[str, Case] = {
    "flags": (make_flags, parse_flags),
    "trajectory.jsonl": (make_trajectory, parse_trajectory),
    "trainer_state.json": (headers.mutated(headers.TRAINER_STATE), parse_trainer_state),
    "headers of a checkpoint": (make_header, parse_header),
    "files of the cache": (make_cache_file, parse_cache_file),
    "group file": (headers.mutated(GROUPS), parse_groups),
    "merge parts": (make_part, parse_part),
    "definition.py": (make_definition, parse_definition),
}


def make_command_targets(folder: Path) -> list[Target]:
    trials = CommandTrials.open(folder)
    (folder / "part-2.csv").write_bytes(merge_parts.encode(merge_parts.OTHER, "csv", folder))

    def bind(parse: Callable[[CommandTrials, Any], None]) -> Callable[[Any], None]:
        return lambda value: parse(trials, value)

    extremes: dict[str, Callable[[], Iterable[Any]]] = {
        "trainer_state.json": partial(extreme_values, headers.TRAINER_STATE),
        "merge parts": lambda: (("jsonl", text) for text in extreme_values(encoded_part("jsonl"))),
    }
    return [
        Target(f"command line: {name}", make, bind(parse), 1, (Refused,), extremes.get(name, tuple))
        for name, (make, parse) in CASES.items()
    ]
