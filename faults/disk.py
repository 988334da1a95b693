"""Disks that fail: one clean message and exit 1, nothing half-written, and the same command succeeds
when the disk is well again.
"""

import json
import math
import random
import re
import shutil
import tempfile
from pathlib import Path

import safetensors

from faults.disk_failures import (
    MOUNTED,
    PAGE,
    PLANTED,
    DiskFailure,
    DiskTrial,
    MakeFailure,
    small_disk,
)
from faults.forks import Ended, copy_folder, import_package, read_files
from faults.kills import (
    COMMANDS,
    Undisturbed,
    judge_end,
    judge_files,
    results,
    run_undisturbed,
    start_command,
)
from faults.runs import build_template, write_small_pieces
from faults.tally import Clock, Tally

# the same commands, with tables in a folder of their own
DISK_COMMANDS = {
    name: tuple(word.replace("table.", "out/table.") for word in arguments)
    for name, arguments in COMMANDS.items()
    if arguments
}
# may be absent at exit 0
BEST_EFFORT = re.compile(r"(sizes-train|sizes-query|agrees|probe-\w+-[0-9a-f]{16})\.json$")


class DiskTrials:
    """Trials in a folder below `place`, which may be the mount point of a small disk."""

    def __init__(self, folder: Path, place: Path, names: list[str]) -> None:
        self.template, self.place, self.logs = folder / "template", place / "work", folder / "logs"
        self.gone = place / "gone"
        if not self.template.exists():
            self.logs.mkdir()
            build_template(self.template)
            for name in ("out", "tmp"):
                (self.template / name).mkdir(exist_ok=True)
        self.given = read_files(self.template)
        self.usual = {
            name: run_undisturbed(DISK_COMMANDS[name], self.template, self.place) for name in names
        }

    def describe_trial(self, name: str, rng: random.Random) -> DiskTrial:
        usual = self.usual[name]
        new = [len(text) for path, text in usual.files.items() if path not in self.given]
        run = next(
            (word for word in DISK_COMMANDS[name] if word in ("run", "trained", "texts")), ""
        )
        folders = ["out", "tmp", "parts", "embeddings"]
        if run:
            folders += [run, f"{run}/checkpoints", *[f"{run}/.influence"] * 3]
        return DiskTrial(
            self.place,
            self.gone,
            folders,
            usual.changes,
            max(new, default=0),
            sum(math.ceil(size / PAGE) for size in new),
            rng,
        )

    def try_failure(self, name: str, make: MakeFailure, rng: random.Random, tally: Tally) -> None:
        """The command on a disk that fails, then again on a disk that is well."""
        usual = self.usual[name]
        shutil.rmtree(self.gone, ignore_errors=True)
        copy_folder(self.template, self.place)
        failure = make(self.describe_trial(name, rng))

        def prepare() -> None:
            write_small_pieces()
            failure.prepare()

        process = start_command(DISK_COMMANDS[name], self.place, prepare, logs=self.logs)
        ended = process.wait(usual.patience)
        failure.end()
        (self.logs / "first").write_text(ended.output)
        trial = f"{name}: {failure.text}"
        tally.tried += 1
        self.judge_failed(ended, usual, failure, tally, trial)
        self.judge_written(usual, failure.keeps_files, tally, trial)
        self.run_again(name, failure, tally, f"{trial}; then again")

    def run_again(self, name: str, failure: DiskFailure, tally: Tally, trial: str) -> None:
        usual = self.usual[name]
        for path, text in self.given.items():  # what vanished
            if not (self.place / path).exists():
                (self.place / path).parent.mkdir(parents=True, exist_ok=True)
                (self.place / path).write_bytes(text)
        for folder in ("out", "tmp"):
            (self.place / folder).mkdir(exist_ok=True)
        # a complete `init` rightly refuses to run again
        if name != "init" or not (self.place / "new" / "definition.py").exists():
            again = start_command(DISK_COMMANDS[name], self.place, logs=self.logs)
            judge_end(again.wait(usual.patience), {0}, tally, trial)
        # a folder that vanished when its content was no longer needed stays away
        judge_files(self.place, usual.files, tally, trial, failure.folders)

    def judge_failed(
        self, ended: Ended, usual: Undisturbed, failure: DiskFailure, tally: Tally, trial: str
    ) -> None:
        """Exit 1 with one message, or exit 0 with all bytes."""
        judge_end(ended, {0, 1}, tally, trial)
        if ended.code == 1:
            tally.refused += 1
            lines = ended.err.splitlines()
            if sum(line.startswith("error: ") for line in lines) != 1:
                tally.fault("traceback", "not one message", f"{trial}: {ended.err}")
        elif ended.code == 0 and "Traceback" not in ended.err:
            content = results(self.place)
            if self.gone.exists():
                content |= {f"out/{path}": text for path, text in read_files(self.gone).items()}
            for path, text in usual.files.items():
                if content.get(path) == text or BEST_EFFORT.search(path) or path in self.given:
                    continue
                if path.startswith("out/") or not failure.folders:
                    tally.fault("silent", f"exit 0 without {Path(path).suffix}", f"{trial}: {path}")
                    return

    def judge_written(
        self, usual: Undisturbed, keeps_files: bool, tally: Tally, trial: str
    ) -> None:
        """No file is half-written, and none is left over."""
        for path, text in results(self.place).items():
            wanted = usual.files.get(path)
            if ".tmp-" in path:
                cause = "" if keeps_files else "a temporary file after an error"
            elif path in self.given and text != self.given[path]:
                cause = "an input changed"
            elif "/evaluate/" in path and wanted is not None:  # a log, which grows
                cause = "" if wanted.startswith(text) else "a log with other lines"
            elif path.endswith(".json"):
                cause = "" if is_json(text) else "a cut JSON file"
            elif wanted is None:
                cause = "" if is_readable(text) else "a file that can't be read"
            else:
                cause = "" if text == wanted else "a half-written file"
            if cause:
                tally.fault("lost", cause, f"{trial}: {path}")


def is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def is_readable(text: bytes) -> bool:
    """Whether it is a complete safetensors file."""
    try:
        safetensors.deserialize(text)
    except safetensors.SafetensorError:
        return False
    return True


def run_disk(count: int, seconds: float, seed: int = 0) -> list[Tally]:
    import_package()
    clock, tallies = Clock(seconds), []
    folder = Path(tempfile.mkdtemp())
    names = list(DISK_COMMANDS)
    try:
        with small_disk(folder / "disk") as mounted:
            (folder / "plain").mkdir()
            plain = DiskTrials(folder, folder / "plain", names)
            failures = [(plain, kind, make) for kind, make in PLANTED.items()]
            if mounted:
                on_disk = DiskTrials(folder, folder / "disk", names)
                failures += [(on_disk, kind, make) for kind, make in MOUNTED.items()]
            for at, (trials, kind, make) in enumerate(failures):
                tally = Tally(f"disk: {kind}", target=max(1, count // len(failures)))
                part = Clock((seconds - clock.seconds) / (len(failures) - at))
                rng = random.Random(f"{seed} {kind}")
                while tally.tried < tally.target and not part.is_over:
                    trials.try_failure(names[tally.tried % len(names)], make, rng, tally)
                tally.seconds = part.seconds
                tallies.append(tally)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return tallies
