"""Signals at random moments: work resumes, and gives the bytes of a run that was left in peace."""

import random
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults.forks import (
    Ended,
    ForkedCommand,
    build_run,
    copy_folder,
    import_package,
    read_files,
    run_command,
)
from faults.tally import Clock, Tally

COMMANDS: dict[str, tuple[str, ...]] = {
    "cache": ("cache", "run"),
    "score tracin": ("score", "run", "--top", "all", "-o", "table.csv"),
    "score grad-cos": ("score", "run", "--method", "grad-cos", "-o", "table.csv"),
    "score repsim": ("score", "run", "--method", "repsim", "-o", "table.csv"),
    "score int8": ("score", "run", "--store", "int8", "-o", "table.csv"),
    "self": ("self", "run", "-o", "table.csv"),
    "inspect": ("inspect", "run"),
    "check": ("check", "run"),
    "init": ("init", "new"),
}
# -N too: the fork had not yet installed its handlers
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}


def results(place: Path) -> dict[str, bytes]:
    """The files that a command leaves: its table, and the cache."""
    content = read_files(place)
    return {name: text for name, text in content.items() if not name.startswith(("out-", "err-"))}


def judge_end(ended: Ended, allowed: set[int], tally: Tally, trial: str) -> None:
    if ended.code is None:
        tally.fault("hang", trial.partition(":")[0], f"{trial}\n{ended.err}")
    elif "Traceback" in ended.err or ended.code not in allowed:
        last = (ended.err.strip().splitlines() or [""])[-1][:80]
        tally.fault("traceback", f"exit {ended.code}: {last}", trial)


def try_kill(
    name: str, arguments: Sequence[str], template: Path, place: Path, wanted: dict[str, bytes],
    seconds: float, rng: random.Random, tally: Tally,
) -> None:  # fmt: skip
    """One or two processes on one cache; a signal to one of them; the command again; the bytes."""
    copy_folder(template, place)
    # of two `init` in one folder, the second rightly refuses
    count, number = 1 if name == "init" else rng.choice((1, 1, 2)), rng.choice(tuple(CODES))
    moment = rng.uniform(0, 1.1 * seconds)
    trial = f"{name}: {signal.Signals(number).name} after {moment:.3f} s, {count} processes"
    processes = [ForkedCommand(arguments, place, str(at)) for at in range(count)]
    time.sleep(moment)
    processes[0].kill(number)
    for at, process in enumerate(processes):
        judge_end(process.wait(), {0, CODES[number], -number} if not at else {0}, tally, trial)
    if name != "init" or not (place / "new" / "definition.py").exists():
        judge_end(run_command(arguments, place), {0}, tally, f"{trial}; then again")
    content = results(place)
    leftovers = [path for path in content if ".tmp-" in path]
    if leftovers:
        tally.fault("lost", "a temporary file is left", f"{trial}: {leftovers[0]}")
    if {path: text for path, text in content.items() if path not in leftovers} != wanted:
        names = [path for path in {**content, **wanted} if content.get(path) != wanted.get(path)]
        tally.fault("lost", "other bytes after resuming", f"{trial}: {names[:3]}")
    tally.tried += 1


def run_kills(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    import_package()
    tally, rng, clock = Tally("kills", target=count), random.Random(seed), Clock(seconds)
    with tempfile.TemporaryDirectory() as folder:
        template, place = Path(folder) / "template", Path(folder) / "place"
        build_run(template / "run")
        undisturbed: dict[str, tuple[dict[str, bytes], float]] = {}
        for name, arguments in COMMANDS.items():
            copy_folder(template, place)
            start = time.monotonic()
            ended = run_command(arguments, place)
            if ended.code:
                raise RuntimeError(f"{name} fails undisturbed: {ended.err}")
            undisturbed[name] = results(place), time.monotonic() - start
        while tally.tried < count and not clock.is_over:
            name = rng.choice(tuple(COMMANDS))
            wanted, duration = undisturbed[name]
            try_kill(name, COMMANDS[name], template, place, wanted, duration, rng, tally)
    tally.seconds = clock.seconds
    return [tally]
