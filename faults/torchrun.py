"""Signals to real jobs of torchrun: to one of two ranks, or to torchrun itself."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from faults.forks import Ended, build_run, copy_folder
from faults.kills import judge_files, results
from faults.runs import TWO_SHARDS
from faults.tally import Tally

JOBS = {
    "cache": ("cache", "run"),
    "score tracin": ("score", "run", "--top", "all", "-o", "table.csv"),
    "self": ("self", "run", "-o", "table.csv"),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
# its ranks are new interpreters, so the definition makes their units small
SMALL_UNITS = """
from influence_cli.extraction import memory_budget
memory_budget.UNIT_EXAMPLES = 16
"""
PATIENCE = 120.0  # seconds; torchrun itself waits 30 for a rank that ignores SIGTERM


class TorchrunTrials:
    def __init__(self, folder: Path) -> None:
        self.template, self.place = folder / "template", folder / "place"
        build_run(self.template / "run", definition=TWO_SHARDS + SMALL_UNITS)
        (self.template / "tmp").mkdir()
        self.usual = {name: self.run_undisturbed(name) for name in JOBS}

    def run_undisturbed(self, name: str) -> dict[str, bytes]:
        copy_folder(self.template, self.place)
        ended = self.wait(self.start(name))
        if ended.code:
            raise RuntimeError(f"torchrun {name} fails undisturbed: {ended.output}")
        return results(self.place)

    def start(self, name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "influence_cli", *JOBS[name]]
        environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.place / "tmp")}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        with (self.place / "err-0").open("w") as log:
            return subprocess.Popen(
                command, cwd=self.place, stdout=log, stderr=log, env=os.environ | environment
            )

    def wait(self, job: subprocess.Popen, ranks: list[int] | None = None) -> Ended:
        """The end of torchrun, and of its ranks: they may outlive it."""
        start, code = time.monotonic(), None
        try:
            code = job.wait(PATIENCE)
            while any(map(is_alive, ranks or [])):
                if time.monotonic() - start > PATIENCE:
                    code = None
                    break
                time.sleep(0.05)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
        if code is None:
            for rank in filter(is_alive, ranks or []):
                os.kill(rank, signal.SIGKILL)
        for path in (self.place / "tmp").glob("torchelastic_*"):  # torchrun's own
            shutil.rmtree(path)
        text = (self.place / "err-0").read_text("utf-8", "replace")
        return Ended(code, text, "", time.monotonic() - start)

    def try_signal(self, name: str, rng: random.Random, tally: Tally) -> None:
        """A signal when a random number of files is there; the job again; the bytes."""
        copy_folder(self.template, self.place)
        number, files = rng.choice(SIGNALS), rng.randint(0, len(self.usual[name]))
        job = self.start(name)
        ranks = self.wait_for_files(job, files)
        target = rng.choice(("torchrun", "rank 0", "rank 1"))
        process = job.pid if target == "torchrun" or len(ranks) < 2 else ranks[int(target[-1])]
        if job.poll() is None and (process == job.pid or is_alive(process)):
            os.kill(process, number)
        trial = f"{name}: {number.name} to {target}, {files} files"
        tally.tried += 1
        judge_job(self.wait(job, ranks), tally, trial)
        again = self.wait(self.start(name))
        judge_job(again, tally, f"{trial}; then again")
        if again.code:
            tally.fault("lost", "the job again fails", f"{trial}: {again.output}")
        judge_files(self.place, self.usual[name], tally, trial)

    def wait_for_files(self, job: subprocess.Popen, files: int) -> list[int]:
        """Wait for so many files of the cache. Returns the ranks' process ids, once they run."""
        start = time.monotonic()
        ranks: list[int] = []
        while job.poll() is None and time.monotonic() - start < PATIENCE:
            ranks = children(job.pid) or ranks
            if len(ranks) == 2 and count_files(self.place) >= files:
                break
            time.sleep(0.005)
        return ranks


def judge_job(ended: Ended, tally: Tally, trial: str) -> None:
    """torchrun prints stack traces of its own; none may lead through our commands."""
    if ended.code is None:
        tally.fault("hang", trial.partition(":")[0], f"{trial}\n{ended.output}")
    elif "/influence_cli/cli/" in ended.err and "Traceback" in ended.err:
        tally.fault("traceback", "of a rank", f"{trial}: {ended.err[-300:]}")


def children(process: int) -> list[int]:
    """The ranks that torchrun started, in the order of their ranks."""
    try:
        return [
            int(text)
            for text in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def is_alive(process: int) -> bool:
    """Whether it runs. A zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def count_files(folder: Path) -> int:
    return sum(1 for path in folder.rglob("*") if path.is_file())
