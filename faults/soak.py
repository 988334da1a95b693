"""Commands again and again over one folder, in one process and in forks: nothing may grow.

After each round of commands the soak counts the files of the folder (cache, temporary files), and of
the process its open descriptors, threads and resident memory. Rule, last third of the rounds against
the middle third: files, descriptors and threads have at most the same maximum. The median of the
memory grows by at most MEMORY. It moved by 0.1 MiB in a soak of two minutes, since allocators reuse
freed blocks in another order each time. A leak of 32 KiB per command exceeds MEMORY in two rounds of
17 commands. Growth counts as lost.
"""

import gc
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from faults.forks import ForkedCommand, import_package, open_streams, run_command
from faults.numeric_runs import NumericRun, build_numeric_run
from faults.tally import Clock, Tally
from influence_cli import cli

MEMORY = 1 << 20  # bytes
TOP = ("--top", "all", "-o", "table.csv")
ROUND: tuple[tuple[str, ...], ...] = (
    ("score", "run", "--lr", "0.1", *TOP),
    ("score", "run", "--lr", "0.1", "--store", "int8", "--verify", *TOP),
    ("score", "run", "--lr", "0.1", "--project", "4", "--cache", "other", *TOP),
    ("score", "run", "--lr", "0.1", "--cache", "none", "--by", "layer", *TOP),
    ("score", "run", "--method", "dve", "--replay", *TOP),
    ("score", "run", "--method", "dve", "--embeddings", "kept", *TOP),
    ("score", "run", "--method", "unroll", *TOP),
    ("score", "run", "--method", "repsim", "--format", "jsonl", "-o", "table.jsonl"),
    ("self", "run", "--lr", "0.1", *TOP),
    ("trace", "run", "--queries", "0", "--train", "0", "-o", "trace.csv"),
    ("score", "run", "--lr", "0.1", "--shard", "1/2", "-o", "part-1.csv"),
    ("score", "run", "--lr", "0.1", "--shard", "2/2", "-o", "part-2.csv"),
    ("merge", "part-1.csv", "part-2.csv", "-o", "merged.csv"),
    ("check", "run"),
    ("cache", "run"),
    ("score", "run", "--steps", "99"),  # an error, too, may leave nothing
)
SLOW: tuple[tuple[str, ...], ...] = (  # every tenth round
    ("inspect", "run"),
    ("evaluate", "run", "tsloo", "--removals", "2", "-o", "evaluated.csv"),
)
CODES = {ROUND[-1]: 2}
Sample = dict[str, int]  # what is counted -> how many


def commands_of(number: int) -> tuple[tuple[str, ...], ...]:
    return ROUND + (SLOW if number % 10 == 0 else ())


def count_files(place: Path) -> Sample:
    """The files below a folder, not those of the soak itself."""
    names = [path for path in place.rglob("*") if not path.name.startswith(("out-", "err-"))]
    return {"files": len(names), "temporary files": sum(".tmp-" in path.name for path in names)}


def count_process() -> Sample:
    """Of this process, after a collection of garbage. Needs Linux' /proc."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "open descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "resident memory": pages * os.sysconf("SC_PAGE_SIZE"),
    }


class OneProcess:
    """A fork that runs round after round of commands by itself, each when it is asked to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._requests, requests = os.pipe()[::-1]
        answers, self._answers = os.pipe()
        self._reader = os.fdopen(answers)
        self.id = os.fork()
        if not self.id:
            os.close(self._requests)
            serve_rounds(place, requests, self._answers)
        os.close(requests)
        os.close(self._answers)

    def run_round(self, number: int) -> tuple[list[list[str]], Sample]:
        """The commands that ended in another way than they must, each with its error; the counts.

        Raises EOFError where the process died.
        """
        os.write(self._requests, b"%d\n" % number)
        line = self._reader.readline()
        if not line:
            raise EOFError("the process died")
        answer = json.loads(line)
        return answer["errors"], answer["sample"]

    def close(self) -> None:
        os.close(self._requests)
        self._reader.close()
        os.waitpid(self.id, 0)


def serve_rounds(place: Path, requests: int, answers: int) -> None:
    """The fork: never returns."""
    try:
        open_streams((place / "out-process", place / "err-process"))
        (place / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(place / "tmp")
        os.chdir(place)
        with os.fdopen(requests) as lines:
            for line in lines:
                errors = [
                    [" ".join(arguments), error]
                    for arguments in commands_of(int(line))
                    if (error := run_here(arguments))
                ]
                answer = {"errors": errors, "sample": count_process()}
                os.write(answers, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def run_here(arguments: Sequence[str]) -> str:
    """The command in this process. Returns what is wrong with its end, or ""."""
    os.ftruncate(1, 0)
    os.ftruncate(2, 0)
    sys.argv = ["influence", *arguments]
    try:
        cli.app()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    sys.stderr.flush()
    return "" if code == CODES.get(tuple(arguments), 0) else f"exit {code}: {last_error()}"


def last_error() -> str:
    return (Path("err-process").read_text("utf-8", "replace").strip().splitlines() or [""])[-1][
        :150
    ]


def run_forks(place: Path, number: int, rng: random.Random, tally: Tally) -> None:
    """A round of commands, each a process; one of them is killed, and runs again."""
    commands = commands_of(number)
    victim = rng.choice(commands)
    for arguments in commands:
        if arguments is victim:
            process = ForkedCommand(arguments, place)
            time.sleep(rng.uniform(0, 0.3))
            process.kill(signal.SIGKILL)
            process.wait()
        ended = run_command(arguments, place)
        tally.tried += 1
        if ended.code is None:
            tally.fault("hang", " ".join(arguments), ended.output)
        elif ended.code != CODES.get(arguments, 0) or "Traceback" in ended.err:
            last = (ended.err.strip().splitlines() or [""])[-1][:80]
            tally.fault("traceback", f"exit {ended.code}: {last}", " ".join(arguments))


def find_growth(samples: Sequence[Sample]) -> list[str]:
    """What grew from the middle third of the samples to the last one; [] for less than 6."""
    third = len(samples) // 3
    if third < 2:
        return []
    middle, last = samples[third : 2 * third], samples[2 * third :]
    grown = []
    for name in samples[0]:
        before, after = ([sample[name] for sample in part] for part in (middle, last))
        if name == "resident memory":
            least, most, limit = statistics.median(before), statistics.median(after), MEMORY
        else:
            least, most, limit = max(before), max(after), 0
        if most > least + limit:
            grown.append(f"{name} grow from {least:,.0f} to {most:,.0f}")
    return grown


def run_soak(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    """`count` seconds of rounds, or as many as there are."""
    import_package()
    length, rng = min(float(count), seconds), random.Random(seed)
    tallies = {name: Tally(f"soak, {length:.0f} s: {name}") for name in ("one process", "forks")}
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name.replace(" ", "-") for name in tallies}
        for place in places.values():
            build_numeric_run(NumericRun("mlp"), place / "run")
        process = OneProcess(places["one process"])
        samples: dict[str, list[Sample]] = {name: [] for name in tallies}
        clock, number = Clock(length), 0
        while not clock.is_over:
            tally = tallies["one process"]
            tally.tried += len(commands_of(number))
            try:
                errors, sample = process.run_round(number)
            except EOFError as error:
                tally.fault("traceback", str(error), f"round {number}")
                break
            for arguments, message in errors:
                tally.fault("traceback", message[:80], arguments)
            samples["one process"].append(count_files(places["one process"]) | sample)
            run_forks(places["forks"], number, rng, tallies["forks"])
            samples["forks"].append(count_files(places["forks"]))
            number += 1
        process.close()
    for name, tally in tallies.items():
        tally.seconds = clock.seconds
        for growth in find_growth(samples[name]):
            tally.fault("lost", growth, f"{len(samples[name])} rounds: {samples[name][-1]}")
    return list(tallies.values())
