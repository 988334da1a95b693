"""python -m faults.mutants: do tests notice small changes of ranking, cache, gradients and methods?

The mutants are drawn by seed from all changes of the files of ROOMS (mutations.py). Each is written
into a copy of the tree, and the tests that run its line are run there, quickest first, until one
fails: first tests of QUICK seconds together, then of SLOW seconds, as they took in the whole suite.
Which tests run a line is measured once, by the whole suite under coverage, and kept (--map). A
survivor may still fail a slower test: --again --slow 300 judges the survivors of a log with more.

The tests of a mutant run in a fork of this process, which has imported torch but nothing of ours: a
mutant costs about a second.
"""

import argparse
import compileall
import contextlib
import importlib
import itertools
import json
import os
import py_compile
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from faults.mutations import Mutation, list_mutations
from faults.suite_map import SuiteMap, build_map

ROOT = Path(__file__).parent.parent
ROOMS = {  # room -> its share, and its files
    "ranking": (0.12, ("output/ranking.py", "output/merge.py")),
    "cache": (0.18, ("cache/*.py",)),
    "gradients": (0.28, ("gradients/*.py",)),
    "extraction": (0.16, ("extraction/*.py",)),
    "methods": (0.26, ("methods/*.py", "methods/reverse/*.py")),
}
LEFT_OUT = (".git", ".venv*", "__pycache__", ".influence", ".hypothesis", ".*_cache")
QUICK, SLOW = 8.0, 30.0  # seconds of tests
WAIT = 4.0  # a mutant that takes so many times as long as its tests hangs
IMPORTED = ("torch", "torch.func", "torch._dynamo", "numpy", "pytest", "hypothesis", "safetensors.torch",
            "typer", "rich.console", "rich.progress", "pyarrow.parquet")  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What happened to a mutant. `outcome`: killed, hang, survived, or uncovered (no test runs it)."""

    mutation: Mutation
    outcome: str
    tests: int
    seconds: float

    @property
    def is_survivor(self) -> bool:
        return self.outcome in ("survived", "uncovered")


def draw_mutations(tree: Path, count: int, seed: int, rooms: list[str]) -> list[Mutation]:
    """`count` mutations in all rooms together, by their shares."""
    drawn = []
    total = sum(ROOMS[room][0] for room in rooms)
    for room in rooms:
        share, patterns = ROOMS[room]
        paths = sorted(path for each in patterns for path in (tree / "influence_cli").glob(each))
        sources = {str(path.relative_to(tree)): path.read_bytes() for path in paths}
        mutations = [m for name, source in sources.items() for m in list_mutations(name, source)]
        random.Random(f"{seed} {room}").shuffle(mutations)
        possible = (m for m in mutations if m.compiles(sources[m.path]))
        drawn += itertools.islice(possible, round(count * share / total))
    return drawn


class MutantRunner:
    """Runs tests on mutants in a copy of the tree."""

    def __init__(self, tree: Path, suite: SuiteMap, slow: float = SLOW) -> None:
        """`slow`: seconds of tests, of which all must pass."""
        self.tree, self.suite, self.slow = tree, suite, slow

    def judge(self, mutation: Mutation) -> Verdict:
        """Quick tests, then slower ones if all of them pass."""
        start = time.monotonic()
        quick, slow = (
            self.suite.tests_of(mutation.path, mutation.line, budget)
            for budget in (QUICK, self.slow)
        )
        outcome = "uncovered"
        for tests in (quick, [test for test in slow if test not in quick]):
            if tests and outcome in ("uncovered", "survived"):
                outcome = self.try_tests(mutation, tests)
        return Verdict(mutation, outcome, len(slow), round(time.monotonic() - start, 1))

    def try_tests(self, mutation: Mutation, tests: list[str]) -> str:
        """The outcome of these tests, on the tree with the mutation."""
        path = self.tree / mutation.path
        source = path.read_bytes()
        try:
            path.write_bytes(mutation.apply(source))
            expected = sum(self.suite.seconds.get(test, 1.0) for test in tests)
            code = self.run_tests(tests, 30 + WAIT * expected)
        finally:
            path.write_bytes(source)
        return "hang" if code is None else "killed" if code else "survived"

    def run_tests(self, tests: list[str], patience: float) -> int | None:
        """The exit code of pytest in a fork; None where it takes longer."""
        sys.stdout.flush()
        process = os.fork()
        if not process:
            self.run_in_fork(tests)
        stop = time.monotonic() + patience
        while time.monotonic() < stop:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                kill_group(process)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        kill_group(process)
        os.waitpid(process, 0)
        return None

    def run_in_fork(self, tests: list[str]) -> None:
        """The child: never returns."""
        code = 1
        try:
            os.setsid()
            log = os.open(self.tree / "mutant.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(self.tree)
            sys.path[:] = [str(self.tree), *(p for p in sys.path if p not in ("", str(ROOT)))]
            for name in [name for name in sys.modules if name.split(".")[0] in ("faults", "tests")]:
                del sys.modules[name]
            os.environ["PYTHONPATH"] = str(self.tree)
            import pytest

            place = f"--basetemp={self.tree / 'pytest-tmp'}"
            flags = [
                "-o",
                "addopts=",
                "-q",
                "-x",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                place,
            ]
            code = int(pytest.main([*flags, *tests]))
        finally:
            os._exit(code)


def kill_group(process: int) -> None:
    """End a fork with the processes that its tests started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)


def copy_tree(target: Path) -> Path:
    """With bytecode that is compared with the text: a mutant is compiled, all else is not."""
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    for folder in ("influence_cli", "faults", "tests"):
        compileall.compile_dir(target / folder, quiet=1, invalidation_mode=mode)
    return target


def run_mutants(
    mutations: list[Mutation], runner: MutantRunner, log: Path | None, again: bool = False
) -> list[Verdict]:
    """`log`: gets a line per verdict; a later run continues it. `again`: judge its survivors again."""
    known = {
        mutation: verdict
        for mutation, verdict in read_log(log).items()
        if not (again and verdict.is_survivor)
    }
    verdicts = []
    for number, mutation in enumerate(mutations, start=1):
        verdict = known.get(mutation) or runner.judge(mutation)
        verdicts.append(verdict)
        if log and mutation not in known:
            with log.open("a") as file:
                file.write(json.dumps(asdict(verdict)) + "\n")
        if verdict.is_survivor and mutation not in known:
            print(f"{number}/{len(mutations)} {verdict.outcome}: {mutation}", flush=True)
    return verdicts


def read_log(log: Path | None) -> dict[Mutation, Verdict]:
    if log is None or not log.exists():
        return {}
    records = [json.loads(line) for line in log.read_text().splitlines()]
    verdicts = [
        Verdict(**{**record, "mutation": Mutation(**record["mutation"])}) for record in records
    ]
    return {verdict.mutation: verdict for verdict in verdicts}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults.mutants")
    parser.add_argument("--count", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--map", type=Path, help="file that keeps which tests run which line")
    parser.add_argument("--log", type=Path, help="file of verdicts; a later run continues it")
    parser.add_argument("--slow", type=float, default=SLOW, help="seconds of tests for a mutant")
    parser.add_argument("--again", action="store_true", help="judge the survivors of the log again")
    flags = parser.parse_args()
    os.environ["PYTHONDONTWRITEBYTECODE"] = (
        "1"  # a mutant may have the size and time of the original
    )
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder) / "tree")
        if flags.map is not None and flags.map.exists():
            suite = SuiteMap.load(flags.map)
        else:
            suite = build_map(tree)
            if flags.map is not None:
                suite.save(flags.map)
        for name in IMPORTED:
            importlib.import_module(name)
        mutations = draw_mutations(tree, flags.count, flags.seed, flags.rooms)
        runner = MutantRunner(tree, suite, flags.slow)
        verdicts = run_mutants(mutations, runner, flags.log, flags.again)
    survivors = [verdict for verdict in verdicts if verdict.is_survivor]
    print(
        f"{len(verdicts)} mutants, {len(survivors)} survivors, {sum(v.seconds for v in verdicts):.0f} s"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
