"""Signals at any moment: work resumes, and gives the bytes of a run that was left in peace.

A signal comes after a random time, or right before a random change of a file. It meets one of one
or two processes on one cache, or both, or a rank of a job.
"""

import os
import random
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.file_changes import SharedCount, watch_changes
from faults.forks import (
    PATIENCE,
    Ended,
    ForkedCommand,
    copy_folder,
    import_package,
    read_files,
)
from faults.runs import build_template, train_run, write_small_pieces
from faults.tally import Clock, Tally
from influence_cli import cli

TABLE, DVE, UNROLL = ("-o", "table.csv"), ("--method", "dve"), ("--method", "unroll")
TRAINED = ("score", "trained", "--top", "all")
COMMANDS: dict[str, tuple[str, ...]] = {
    "cache": ("cache", "run"),
    "score tracin": ("score", "run", "--top", "all", *TABLE),
    "score by layer": ("score", "run", "--by", "layer", "-o", "table.jsonl"),
    "score grad-cos": ("score", "run", "--method", "grad-cos", *TABLE),
    "score repsim": ("score", "run", "--method", "repsim", *TABLE),
    "score int8": ("score", "run", "--store", "int8", *TABLE),
    "score projected": ("score", "run", "--project", "4", *TABLE),
    "score shard": ("score", "run", "--shard", "1/2", *TABLE),
    "score parquet": ("score", "run", "-o", "table.parquet"),
    "score tracin-we": ("score", "texts", "--method", "tracin-we", "--by", "word", *TABLE),
    "score dve": (*TRAINED, *DVE, *TABLE),
    "score dve --replay": (*TRAINED, *DVE, "--replay", *TABLE),
    "score dve --embeddings": (*TRAINED, *DVE, "--embeddings", "embeddings", *TABLE),
    "score unroll": (*TRAINED, *UNROLL, *TABLE),
    "score unroll --replay": (*TRAINED, *UNROLL, "--replay", *TABLE),
    "self": ("self", "run", *TABLE),
    "trace": ("trace", "trained", "--queries", "3", "--train", "17", *TABLE),
    "evaluate": ("evaluate", "trained", "tsloo", *DVE, "--removals", "6", *TABLE),
    "merge": ("merge", "parts/1.csv", "parts/2.csv", *TABLE),
    "inspect": ("inspect", "run"),
    "check": ("check", "run"),
    "init": ("init", "new"),
    "training": (),  # no command: a program that records its training
}
# -N too: the fork had not yet installed its handlers
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}
ALONE = ("init", "training")  # of two in one folder, the second is rightly refused
# what evaluate writes about time, never the same twice: the last cell of a table, and the end of a
# line of its results, which may be cut
SECONDS = re.compile(rb', [0-9.]+ s(?=")|,( ("(s[^\n]*)?)?)?(?=\n|\Z)')
SLOWER = 30  # a trial that takes so many times the undisturbed run hangs


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves when nobody disturbs it."""

    files: dict[str, bytes]
    seconds: float
    changes: int  # of files

    @property
    def patience(self) -> float:
        return max(PATIENCE, SLOWER * self.seconds)


@dataclass(frozen=True)
class Moment:
    """When a signal comes: after some seconds, or before a change of a file."""

    number: signal.Signals
    seconds: float
    change: int | None = None

    @classmethod
    def draw(cls, usual: Undisturbed, rng: random.Random) -> "Moment":
        number = rng.choice(tuple(CODES))
        if usual.changes and rng.random() < 0.5:
            return cls(number, 0.0, rng.randint(1, usual.changes))
        return cls(number, rng.uniform(0, 1.1 * usual.seconds))

    def __str__(self) -> str:
        when = f"after {self.seconds:.3f} s"
        if self.change is not None:
            when = f"before change {self.change}"
        return f"{self.number.name} {when}"

    def prepare_in(self, place: Path) -> Callable[[], None]:
        """What a fork does first: many small files, and the signal if a change brings it."""

        def prepare() -> None:
            write_small_pieces()
            if self.change is not None:
                watch_changes(place, self.signal_at_change)

        return prepare

    def signal_at_change(self, number: int, kind: str, path: str | None) -> None:
        if number == self.change:
            os.kill(os.getpid(), self.number)

    def codes(self) -> set[int]:
        return {0, CODES[self.number], -self.number}


def results(place: Path) -> dict[str, bytes]:
    """The files that a command leaves: its table, and the cache. Not what it printed."""
    content = read_files(place)
    return {
        name: SECONDS.sub(b"", text) if "/evaluate/" in name or name == "table.csv" else text
        for name, text in content.items()
        if not name.startswith(("out-", "err-"))
    }


def judge_end(ended: Ended, allowed: Collection[int | None], tally: Tally, trial: str) -> None:
    if ended.code is None:
        tally.fault("hang", trial.partition(":")[0], f"{trial}\n{ended.output}")
    elif "Traceback" in ended.err or ended.code not in allowed:
        last = (ended.err.strip().splitlines() or [""])[-1][:80]
        tally.fault("traceback", f"exit {ended.code}: {last}", trial)


def judge_files(
    place: Path, wanted: dict[str, bytes], tally: Tally, trial: str, optional: tuple[str, ...] = ()
) -> None:
    """The files of the undisturbed run, all bytes equal, and nothing else.

    `optional`: beginnings of the names of files that may be absent.
    """
    leftovers = sorted(str(path.relative_to(place)) for path in place.rglob(".tmp-*"))
    if leftovers:
        tally.fault("lost", "a temporary file is left", f"{trial}: {leftovers[0]}")
    content = {name: text for name, text in results(place).items() if ".tmp-" not in name}
    names = [
        path
        for path in {**content, **wanted}
        if content.get(path) != wanted.get(path)
        and (path in content or not path.startswith(optional))
    ]
    if names:
        tally.fault("lost", "other bytes after resuming", f"{trial}: {names[:3]}")


def start_command(
    arguments: Sequence[str],
    place: Path,
    prepare: Callable[[], None] = write_small_pieces,
    name: str = "0",
    logs: Path | None = None,
) -> ForkedCommand:
    main = cli.app if arguments else lambda: train_run(Path("recorded"))
    return ForkedCommand(arguments, place, name, prepare, logs=logs, main=main)


def run_undisturbed(arguments: Sequence[str], template: Path, place: Path) -> Undisturbed:
    copy_folder(template, place)
    count = SharedCount()

    def prepare() -> None:
        write_small_pieces()
        watch_changes(place, lambda *_: None, count)

    ended = start_command(arguments, place, prepare).wait()
    if ended.code:
        raise RuntimeError(f"{' '.join(arguments)} fails undisturbed: {ended.output}")
    return Undisturbed(results(place), ended.seconds, count.get())


class KillTrials:
    """Trials of one campaign: the template, the place of the trials, and the undisturbed runs."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.template, self.place = folder / "template", folder / "place"
        build_template(self.template)
        self.usual = {
            name: run_undisturbed(COMMANDS[name], self.template, self.place) for name in names
        }

    def try_kill(self, name: str, count: int, rng: random.Random, tally: Tally) -> None:
        """`count` processes; a signal to the first, or to the first two."""
        moments = [Moment.draw(self.usual[name], rng)]
        if count > 1 and rng.random() < 0.5:
            moments.append(Moment.draw(self.usual[name], rng))
        self.try_moments(name, count, moments, tally)

    def try_moments(self, name: str, count: int, moments: list[Moment], tally: Tally) -> None:
        """Send signals to `count` processes; run the command again; compare all bytes."""
        usual = self.usual[name]
        copy_folder(self.template, self.place)
        trial = f"{name}: {count} of it, {' and '.join(map(str, moments))}"
        self.signal_processes(name, count, moments, tally, trial)
        tally.tried += 1
        # a complete `init` rightly refuses to run again
        if name != "init" or not (self.place / "new" / "definition.py").exists():
            again = start_command(COMMANDS[name], self.place)
            judge_end(again.wait(usual.patience), {0}, tally, f"{trial}; then again")
        judge_files(self.place, usual.files, tally, trial)

    def signal_processes(
        self, name: str, count: int, moments: list[Moment], tally: Tally, trial: str
    ) -> None:
        processes = []
        for at in range(count):
            prepare = (
                moments[at].prepare_in(self.place) if at < len(moments) else write_small_pieces
            )
            processes.append(start_command(COMMANDS[name], self.place, prepare, str(at)))
        start = time.monotonic()
        timed = [(moment, at) for at, moment in enumerate(moments) if moment.change is None]
        for moment, at in sorted(timed, key=lambda pair: pair[0].seconds):
            time.sleep(max(0.0, start + moment.seconds - time.monotonic()))
            processes[at].kill(moment.number)
        for at, process in enumerate(processes):
            allowed = moments[at].codes() if at < len(moments) else {0}
            judge_end(process.wait(self.usual[name].patience), allowed, tally, trial)


def run_kills(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    import_package()
    clock, tallies = Clock(seconds), []
    folder = Path(tempfile.mkdtemp())
    try:
        trials = KillTrials(folder, list(COMMANDS))
        together = [name for name in COMMANDS if name not in ALONE]
        rows = (("one process", 1, 0.6, list(COMMANDS)), ("two processes", 2, 1.0, together))
        remaining = count
        for label, processes, share, names in rows:  # `share`: of what remains
            tally = Tally(f"kills: {label}", target=round(remaining * share))
            remaining -= tally.target
            rng = random.Random(f"{seed} {processes}")
            part = Clock(share * (seconds - clock.seconds))
            while tally.tried < tally.target and not part.is_over:
                trials.try_kill(names[tally.tried % len(names)], processes, rng, tally)
            tally.seconds = part.seconds
            tallies.append(tally)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tallies
