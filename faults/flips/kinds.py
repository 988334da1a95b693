"""The kinds of stored file, and the command that reads each."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from faults.flips.runs import build_adam, build_larger, build_plain, build_recorded, build_words
from influence_cli.methods.reverse import resume

Arguments = tuple[str, ...]
UNITS, QUERIES = "run/.influence/*/step-*/train/*/*", "run/.influence/*/step-*/query/*/*/*"
CHECK = ("check", "run", "--layers", "0.bias", "--train", "0:1", "--queries", "0:1", "-o", "check.csv")  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """Files of one kind: those of `pattern` after the commands `make` ran in a built run.

    `use` reads them and writes table.csv. `suffix`: only tensors with such names are flipped.
    `keeps_times`: the cache takes the flipped file for the one that it knows, as it does after a
    disk flips a bit: no time stamp changes. `effort`: its share of the time, by its header bytes.
    """

    name: str
    pattern: str
    use: Arguments
    build: Callable[[Path], None] = build_plain
    make: tuple[Arguments, ...] = ()
    suffix: str = ""
    check: Arguments = CHECK
    keeps_progress: bool = False
    keeps_times: bool = False
    effort: float = 1.0


def score(*flags: str) -> Arguments:
    return ("score", "run", *flags, "--top", "all", "-o", "table.csv", "--verify")


def gradients(name: str, *flags: str, suffix: str = "") -> Kind:
    """The units of training gradients, stored in some format."""
    return Kind(
        name,
        UNITS,
        score(*flags),
        make=(score(*flags),),
        suffix=suffix,
        effort=0.2 if suffix else 1.0,
    )


def shard(index: int, suffix: str) -> Arguments:
    return ("score", "run", "--shard", f"{index}/2", "-o", f"part-{index}{suffix}")


def parts(suffix: str) -> Kind:
    use = ("merge", f"part-1{suffix}", f"part-2{suffix}", "-o", "table.csv")
    return Kind(
        f"parts of a merge ({suffix[1:]})", f"part-1{suffix}*", use, build_larger,
        make=(shard(1, suffix), shard(2, suffix)),
    )  # fmt: skip


def saved_progress(*flags: str) -> Kind:
    use = score(*flags)[:-1]
    return Kind(
        f"back/ of {' '.join(flags[1:])}", "run/.influence/back/*/*", use, build_recorded, (use,),
        keeps_progress=True, effort=2.6,
    )  # fmt: skip


KINDS = (
    gradients("float32"),
    gradients("float16", "--store", "float16"),
    gradients("bfloat16", "--store", "bfloat16"),
    gradients("int8", "--store", "int8"),
    gradients("scales of int8", "--store", "int8", suffix=".scale"),
    gradients("projected", "--project", "4"),
    gradients("projected int8", "--project", "4", "--store", "int8"),
    Kind(
        "norms", UNITS, ("self", "run", "--top", "all", "-o", "table.csv", "--verify"),
        make=(("self", "run", "-o", "table.csv"),),
    ),
    Kind("stored queries", QUERIES, score(), make=(score(),)),
    Kind(
        "word embeddings", UNITS, score("--method", "tracin-we"), build_words,
        (score("--method", "tracin-we"),), check=(*CHECK[:3], "out.bias", *CHECK[4:]),
    ),
    Kind("small files of the cache", "run/.influence/**/*.json", score(), make=(score(),)),
    saved_progress("--method", "unroll"),
    saved_progress("--method", "dve", "--replay"),
    Kind(
        "data value embeddings", "run/.influence/embeddings/**/*",
        score("--method", "dve", "--embeddings", "run/.influence/embeddings")[:-1], build_recorded,
        (score("--method", "dve", "--embeddings", "run/.influence/embeddings"),), effort=3.0,
    ),
    Kind("recorded trajectory", "run/trajectory.jsonl", score("--method", "dve"), build_recorded, (score("--method", "dve"),), effort=0.5),
    Kind("recorded checkpoints", "run/checkpoints/*", score(), build_recorded, (score(),)),
    Kind(
        "optimizer states", "run/optimizer/step-000004*", score("--method", "unroll", "--replay")[:-1],
        build_adam, (score("--method", "unroll", "--replay")[:-1],),
    ),
    Kind(
        "results of evaluate", "run/.influence/evaluate/**/*",
        ("evaluate", "run", "tsloo", "--queries", "0:3", "--removals", "4", "-o", "table.csv"),
        build_recorded,
        (("evaluate", "run", "tsloo", "--queries", "0:3", "--removals", "4", "-o", "table.csv"),),
    ),
    parts(".csv"),
    parts(".jsonl"),
    parts(".parquet"),
    Kind(
        "checkpoints without checksums", "run/checkpoints/*", score(), make=(score(),),
        keeps_times=True, effort=0.2,
    ),
)  # fmt: skip


@contextmanager
def kept_progress(kind: Kind) -> Iterator[None]:
    """A reverse pass in this block saves after each step, and leaves its files."""
    if not kind.keeps_progress:
        yield
        return
    discard, seconds = resume.PassProgress.discard, resume.SAVE_SECONDS
    resume.PassProgress.discard = lambda self: None  # type: ignore[method-assign]
    resume.SAVE_SECONDS = 0.0
    try:
        yield
    finally:
        resume.PassProgress.discard = discard  # type: ignore[method-assign]
        resume.SAVE_SECONDS = seconds
