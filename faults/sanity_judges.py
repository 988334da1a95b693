"""Judges of scores: a table against float64 autograd, and two tables of one question.

A judge returns whether the command was refused. It raises WrongTable or CommandFault.
"""

import csv
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from faults.forks import Ended, run_command
from faults.numeric_runs import (
    LR,
    POOL,
    QUERIES,
    NumericRun,
    Reference,
    build_numeric_run,
)

EXACT = 5e-6  # rounding in float32, relative to the norms of both sides
FLOAT64 = 1e-12
# of two ways to compute a table, relative to the largest score; docs/methods.md says about 1e-7
SAME = 1e-6
STORES = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2}
METHODS = ("tracin", "grad-dot", "grad-cos", "tracin-we", "dve", "unroll", "repsim", "self")
PRODUCTS = ("tracin", "grad-dot", "grad-cos", "tracin-we")
FEW_DIGITS = "few right digits"


@dataclass(frozen=True)
class Question:
    """A command on a run. `limit`: of the distance to the reference."""

    method: str
    run: NumericRun
    flags: tuple[str, ...] = ()
    limit: float = EXACT

    @property
    def arguments(self) -> tuple[str, ...]:
        command = ("self",) if self.method == "self" else ("score", "--method", self.method)
        rate = ("--lr", str(LR)) if self.method in ("tracin", "tracin-we", "self") else ()
        table = ("--top", "all", "-o", "table.csv")
        return (command[0], "run", *command[1:], *rate, *table, *self.flags)

    def __str__(self) -> str:
        return f"{self.run}: influence {' '.join(self.arguments)}"


class CommandFault(Exception):
    """A command that hung, or ended with a traceback or another code than 0 and 1."""

    def __init__(self, ended: Ended) -> None:
        self.kind = "hang" if ended.code is None else "traceback"
        last = (ended.err.strip().splitlines() or [""])[-1][:80]
        super().__init__(f"exit {ended.code}: {last}")


class WrongTable(Exception):
    """A table with other numbers, or in another order, than it must have."""


def expect(holds: bool, cause: str) -> None:
    if not holds:
        raise WrongTable(cause)


def read_table(path: Path, size: int, is_self: bool) -> tuple[Tensor, bytes]:
    """(Q, N) scores and the bytes. Raises WrongTable: a number that is not finite, a missing pair,
    or an order other than falling size, then rising id.
    """
    content = path.read_bytes()
    rows = list(csv.DictReader(content.decode().splitlines()))
    scores = torch.full((1 if is_self else QUERIES, size), torch.nan, dtype=torch.float64)
    places = []
    for row in rows:
        query, train, score = int(row.get("query", 0)), int(row["train"]), float(row["score"])
        expect(abs(score) < float("inf"), "a score that is not finite")
        scores[query, train] = score
        places.append((query, score < 0, -abs(score), train))
        expect(is_self or (row["kind"] == "opponent") == (score < 0), "a kind that is not the sign")
    expect(len(rows) == scores.numel() and bool(scores.isfinite().all()), "a pair is missing")
    expect(places == sorted(places), "another order")
    return scores, content


class Bench:
    """Runs questions, each on a run of its own folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.number = folder, 0

    def ask(self, question: Question, fresh: bool = True) -> tuple[Ended, Path]:
        """How the command ended, and its folder. `fresh`: on a new copy of the run."""
        if fresh:
            self.number += 1
        place = self.folder / str(self.number)
        if fresh:
            build_numeric_run(question.run, place / "run")
        (place / "table.csv").unlink(missing_ok=True)
        return run_command(question.arguments, place), place

    def table(self, question: Question, fresh: bool = True) -> tuple[Tensor, bytes, str] | None:
        """Scores, bytes, stderr; None for a clean refusal. Raises WrongTable."""
        ended, place = self.ask(question, fresh)
        if ended.code is None or "Traceback" in ended.err or ended.code not in (0, 1):
            raise CommandFault(ended)
        if ended.code:
            expect(not (place / "table.csv").exists(), "a table beside an error")
            return None
        size = len(question.run.order)
        return *read_table(place / "table.csv", size, question.method == "self"), ended.err


# ---------------------------------------------------------------- judges
def compare_with_reference(bench: Bench, question: Question, may_refuse: bool) -> bool:
    result = bench.table(question)
    if result is None:
        expect(may_refuse, "a run that must have scores is refused")
        return True
    scores, _, err = result
    reference = Reference(question.run, bench.folder / str(bench.number) / "run")
    normalize = "--normalize" in question.flags
    expected, sizes = (
        reference.self_scores()
        if question.method == "self"
        else reference.scores(question.method, normalize)
    )
    is_right = bool(((scores - expected).abs() <= question.limit * sizes).all())
    if not is_right and FEW_DIGITS in err and may_refuse:
        return True
    expect(is_right, "other scores than float64 autograd")
    return False


def compare_variants(bench: Bench, first: Question, second: Question, limit: float) -> bool:
    """Two ways to ask for the same scores. `second` may order the training set in another way."""
    tables = [bench.table(question) for question in (first, second)]
    if tables[0] is None or tables[1] is None:
        expect(tables[0] is tables[1], "one of two equal questions is refused")
        return True
    one, two = (table[0] for table in tables if table is not None)
    two = two[:, [second.run.order.index(item) for item in first.run.order]]
    two = two / second.run.scale**2 * first.run.scale**2 if scales(first) else two
    largest = one.abs().max()
    expect(bool(((one - two).abs() <= limit * largest).all()), "scores depend on the way")
    return False


def scales(question: Question) -> bool:
    """Whether the scores grow with the square of the loss."""
    return (
        question.method in ("tracin", "grad-dot", "tracin-we", "self")
        and "--normalize" not in question.flags
    )


def compare_bytes(bench: Bench, question: Question) -> bool:
    """The same command: in two folders, and again on its cache."""
    tables = [bench.table(question), bench.table(question), bench.table(question, fresh=False)]
    if None in tables:
        expect(tables.count(None) == 3, "one of equal commands is refused")
        return True
    expect(len({table[1] for table in tables if table}) == 1, "two runs give other bytes")
    return False


def compare_threads(bench: Bench, question: Question) -> bool:
    """One thread and two, each in a process of its own: threads do not survive a fork."""
    tables = []
    for threads in ("1", "2"):
        bench.number += 1
        place = bench.folder / str(bench.number)
        build_numeric_run(question.run, place / "run")
        command = (sys.executable, "-m", "influence_cli", *question.arguments)
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        ended = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        if ended.returncode:
            raise CommandFault(Ended(ended.returncode, ended.stderr))
        tables.append(read_table(place / "table.csv", POOL, question.method == "self")[0])
    one, two = tables
    close = (one - two).abs() <= SAME * one.abs().max()
    expect(bool(close.all()), "scores depend on threads")
    return False


def refuse_zeros(bench: Bench, question: Question) -> bool:
    """A run without gradients: an error, not a table of zeros."""
    expect(bench.table(question) is None, "a table of zeros without a word")
    return True


def note_zero_query(bench: Bench, question: Question) -> bool:
    """A query without a gradient: zeros and a note."""
    result = bench.table(question)
    assert result is not None
    expect(not result[0][2].any(), "a zero gradient has scores")
    expect(
        re.search("query 2 (is|are) 0", result[2]) is not None, "a query of zeros without a word"
    )
    return compare_with_reference(bench, question, False)


def compare_trace(bench: Bench, question: Question) -> bool:
    """The scores of `trace` sum to those of `score`."""
    result = bench.table(question)
    if result is None:
        return True
    place = bench.folder / str(bench.number)
    flags = ("--train", "0:", "--format", "csv", "-o", "trace.csv", *question.flags)
    ended = run_command(("trace", "run", "--method", question.method, *flags), place)
    expect(ended.code == 0, f"trace fails: {ended.err[-60:]}")
    sums = torch.zeros_like(result[0])
    for row in csv.DictReader((place / "trace.csv").read_text().splitlines()):
        expect(abs(float(row["running"])) < float("inf"), "a cell of trace that is not finite")
        if row["train"] != "all":
            sums[int(row["query"]), int(row["train"])] += float(row["score"])
    largest = result[0].abs().max()
    expect(bool(((sums - result[0]).abs() <= SAME * largest).all()), "trace sums to other scores")
    return False
