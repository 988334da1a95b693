"""What flags say: ids, shards, steps, numbers, globs, group files."""

import io
import math
import random
from functools import partial
from pathlib import Path

from hypothesis import strategies as st

from faults.inputs.target import Target, expect
from faults.mutate import EXTREME_TEXTS, mutate_bytes
from influence_cli.api import specs
from influence_cli.errors import UsageProblem
from influence_cli.parallel.shards import parse_shard
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.run import select_steps

SIZE = 100  # examples of the data set that specs refer to
PARTS = ("", "0", "5", "99", "100", "007", "9" * 30, "٣", "²", "1_0", "+1", " 3 ", "-1")
LONG_SPECS = ("9" * 5000, "9" * 5000 + ":", ":" * 5000, ",".join(["1"] * 500_000), "\ud800", "\x00")
STEPS = (0, 5, 7, 99, 800)
PLAIN = frozenset("0123456789:,")

spec_texts = st.one_of(
    st.from_regex(r"\A(\d{0,3}(:\d{0,3})?)(,(\d{0,3}(:\d{0,3})?)){0,3}\Z"),
    st.text(alphabet=st.sampled_from("0123456789:,-+_ #@٣²"), max_size=8),
)


def make_spec(rng: random.Random) -> str:
    part = partial(rng.choice, PARTS)
    spec = ",".join(
        rng.choice((part, lambda: f"{part()}:{part()}"))() for _ in range(rng.randint(1, 3))
    )
    if rng.random() < 0.3:
        spec = mutate_bytes(spec.encode(), rng).decode("utf-8", "replace").replace("\x00", "0")
    return "9" * 5000 if rng.random() < 1e-4 else spec


def numbers_of(spec: str, size: int) -> set[int]:
    """The numbers that a spec of digits, colons and commas names."""
    numbers: set[int] = set()
    for part in filter(None, spec.split(",")):
        low, colon, high = part.partition(":")
        stop = int(low) + 1 if not colon else int(high or size)
        numbers |= set(range(int(low or 0), min(stop, size)))
    return numbers


def parse_ids(spec: str) -> None:
    spec = spec.lstrip("@")  # which names a file
    ids = specs.ids("--queries", spec, SIZE, "query", io.StringIO("3 4"))
    expect(all(0 <= index < SIZE for index in ids), "an id out of range")
    if not set(spec) - PLAIN:
        expect(sorted(numbers_of(spec, SIZE)) == list(ids), "other ids")


def parse_steps(spec: str) -> None:
    checkpoints = tuple(Checkpoint(step, Path(f"step-{step}"), ()) for step in STEPS)
    steps = [checkpoint.step for checkpoint in select_steps(checkpoints, spec)]
    expect(bool(steps) and steps == sorted(set(steps)), "steps that do not rise")
    expect(not set("".join(spec.split())) - PLAIN, "a step that is not in digits")
    wanted = numbers_of("".join(spec.split()), max(STEPS) + 1) & set(STEPS)
    expect(set(steps) == wanted, "other steps")


def parse_shard_spec(spec: str) -> None:
    shard = parse_shard(spec, {})
    expect(1 <= shard.index <= shard.count, "no such shard")
    if not set(spec) - set("0123456789/") and len(spec) < 18:
        expect(
            f"{shard.index}/{shard.count}" == "/".join(str(int(n)) for n in spec.split("/")),
            "another shard",
        )


# ---------------------------------------------------------------- environment and numbers
VARIABLES = ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_STEP", "TASK_COUNT")


def make_environment(rng: random.Random) -> dict[str, str]:
    values = ("0", "1", "2", "3", "8", "", "-1", "9" * 5000, "x", "٣", "\x1b[31m", "1e3")
    names = [f"SLURM_ARRAY_{name}" for name in VARIABLES] + ["JOB_COMPLETION_INDEX"]
    low, count = rng.choice((0, 1)), rng.randint(1, 9)
    valid = (str(low + rng.randrange(count)), str(low), str(low + count - 1), "1", str(count))
    environ = dict(zip(names, valid, strict=False))
    for name in names:
        if rng.random() < 0.15:
            environ[name] = rng.choice(values)
        if rng.random() < 0.05:
            environ.pop(name, None)
    return environ


def parse_environment(environ: dict[str, str]) -> None:
    shard = parse_shard("auto", environ)
    expect(1 <= shard.index <= shard.count, "no such shard")
    names = ("MIN", "STEP", "ID")
    low, step, own = (int((environ.get(f"SLURM_ARRAY_TASK_{name}") or "1")[:18]) for name in names)
    expect(low + (shard.index - 1) * step == own, "another shard")


def make_numbers(rng: random.Random) -> tuple[str, str, int | None, str | None, int | None]:
    text = partial(
        rng.choice, ("1", "all", "auto", "0", "٣", "²", "1.5", "", "9" * 5000, " 2", "-3")
    )
    return (
        text(), text(),
        rng.choice((None, 0, 1, 16, 17, -1, 2**31, 10**400)),
        rng.choice((None, "kronecker", "sparse", "x\x1b[31m")),
        rng.choice((None, 0, 7, -1, 2**63, 10**400)),
    )  # fmt: skip


def parse_numbers(values: tuple[str, str, int | None, str | None, int | None]) -> None:
    top, batch_size, project, kind, seed = values
    expect((specs.top(top) or 1) >= 1, "a --top below 1")
    expect((specs.batch_size(batch_size) or 1) >= 1, "a --batch-size below 1")
    projection = specs.projection(project, kind, seed)
    if projection is not None:
        expect(projection[1:] == (project, seed or 0), "another projection")
        expect(
            projection[0] != "kronecker" or math.isqrt(project or 0) ** 2 == project, "no square"
        )


# ---------------------------------------------------------------- files of a flag
def make_group_target(path: Path) -> Target:
    valid = "".join(f"group {number % 3}\n" for number in range(5)).encode()

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        names = specs.group_file(path, 5)
        lines = io.StringIO(text.decode(), newline=None).read().split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        expect([line.strip() for line in lines] == names, "other lines")

    return Target(
        "group file",
        lambda rng: mutate_bytes(valid, rng),
        parse,
        15,
        extremes=lambda: EXTREME_TEXTS,
    )


def make_ids_file_target(path: Path) -> Target:
    """`--queries @FILE`."""

    def parse(text: bytes) -> None:
        path.write_bytes(text)
        ids = specs.ids("--queries", f"@{path}", SIZE, "query", io.StringIO())
        words = [
            word
            for line in io.StringIO(text.decode(), newline=None)
            for word in line.partition("#")[0].replace(",", " ").split()
        ]
        if not {character for word in words for character in word} - PLAIN:
            expect(sorted(numbers_of(",".join(words), SIZE)) == list(ids), "other ids")

    valid = b"0 1\n5:9, 20 # the first\n\n99\n"
    return Target(
        "file of ids",
        lambda rng: mutate_bytes(valid, rng),
        parse,
        15,
        extremes=lambda: EXTREME_TEXTS,
    )


def make_targets(folder: Path) -> list[Target]:
    return [
        Target(
            "spec of ids", make_spec, parse_ids, 120, extremes=lambda: LONG_SPECS, strategy=spec_texts
        ),
        Target(
            "spec of steps", make_spec, parse_steps, 60,
            extremes=lambda: LONG_SPECS, strategy=spec_texts,
        ),
        Target(
            "shard", lambda rng: make_spec(rng).replace(":", "/"), parse_shard_spec, 80,
            extremes=lambda: [spec.replace(":", "/") for spec in LONG_SPECS],
        ),
        Target(
            "shard of a job array", make_environment, parse_environment, 40,
            (UsageProblem,),
        ),
        Target("numbers of flags", make_numbers, parse_numbers, 40, (UsageProblem,)),
        make_group_target(folder / "groups.txt"),
        make_ids_file_target(folder / "ids.txt"),
    ]  # fmt: skip
