"""Our whole job beside public peers', each in a virtual environment of its own: `make bench-peers` makes them.

python benchmarks/peers.py [w1 w2 w3 w4 gpt2] [--peers captum ...] [--train N] [--limit SECONDS] [--rounds 1] [--venvs DIR]

A job is the scores of all queries against all training examples over all checkpoints, and the top 10 of each query. Each runs in a process
of its own (peers/job.py; imports, data and models are not timed), in turns with ours on the layers that the peer covers, and with its floor,
one forward+backward of the training examples. Wall seconds: the least and the median of all runs. `x floor` is the least / (floor x
checkpoints). `x ours` is the least to the least of our `--cache none`, in wall and in processor seconds; below 1 the peer is faster. Pearson
and difference (largest absolute one / largest exact score) are to those scores of ours. A job past the limit has no numbers. On a machine
that others use, run it with OMP_NUM_THREADS=1 and read processor seconds. gpt2 is W4's size as a Hugging Face model, for bergson; ours then
runs in bergson's environment, which has transformers.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import machine

HERE = Path(__file__).resolve().parent
TRAIN = {
    "w1": 1000,
    "w2": 200,
    "w3": 200,
    "w4": 64,
    "gpt2": 64,
}  # small, so that the slowest finish
PEERS = {  # peer -> job of its runner -> what it computes
    "captum": {
        "batched": "TracInCP, its rule for batches: exact, Linear and Conv2d layers",
        "one by one": "TracInCP: exact, all parameters",
        "fast": "TracInCPFast: exact, last layer's weight",
    },
    "dattri": {
        "exact": "TracIn: exact, all parameters",
        "projected": "TracIn: all parameters, projected to 512",
    },
    "kronfluence": {"identity": "identity strategy: exact, Linear and Conv2d layers"},
    "traker": {"projected": "all parameters, projected to 512"},
    "bergson": {
        "projected": "index: blocks' layers, projected to 16 x 16 each",
        "whole": "index: blocks' layers, exact",
    },
}
OURS = {
    "none": "tracin --cache none: exact, all parameters",
    "disk": "tracin, gradients kept on disk: exact, all parameters",
}
OURS["projected"] = "tracin --project 64, kept on disk: all parameters"
HUGGING_FACE = "takes Hugging Face causal language models only: see gpt2"
CANNOT = {("captum", "fast", "w4"): "takes one output position an example"}
CANNOT |= {
    ("bergson", job, name): HUGGING_FACE
    for job in PEERS["bergson"]
    for name in ("w1", "w2", "w3", "w4")
}


WALL, PROCESSOR = CLOCKS = (0, 1)
LIMIT = 30.0


class Failed(Exception):
    """Why a job has no row of numbers."""


@dataclass
class Result:
    """`seconds`: wall and processor seconds of each run. `floor`: the least of both."""

    seconds: list[list[float]]
    floor: list[float]
    checkpoints: int
    version: str
    layers: tuple[str, ...]
    scores: np.ndarray  # (Q, N)

    def least(self, clock: int) -> float:
        return min(one[clock] for one in self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(one[WALL] for one in self.seconds)

    def add(self, other: "Result") -> None:
        """Another round of the same job."""
        self.seconds += other.seconds
        self.floor = [min(pair) for pair in zip(self.floor, other.floor, strict=True)]


@dataclass(frozen=True)
class Measure:
    limit: float  # seconds for a process

    def run(
        self,
        python: Path,
        runner: str,
        job: str,
        workload: str,
        train: int,
        layers: tuple[str, ...] = (),
    ) -> Result:
        with tempfile.TemporaryDirectory(prefix="influence-peers-") as folder:
            given = [runner, job, workload, str(train), folder, *layers]
            out = self._started([str(python), "-P", str(HERE / "peers" / "job.py"), *given])
            told = json.loads(out.splitlines()[-1])
            scores = np.load(Path(folder) / "scores.npy")
        return Result(
            told["seconds"],
            told["floor"],
            told["checkpoints"],
            told["version"],
            tuple(told["layers"]),
            scores,
        )

    def _started(self, command: list[str]) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        process = subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        try:
            out, err = process.communicate(timeout=self.limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"over {self.limit:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode:
            lines = err.strip().splitlines() or [f"exit status {process.returncode}"]
            raise Failed(f"could not run: {lines[-1][:120]}")
        return out


class Workload:
    """One workload, and the rounds in which ours and a peer take turns."""

    def __init__(self, name: str, train: int, measure: Measure, venvs: Path, rounds: int) -> None:
        self.name, self.train, self.measure, self.venvs = name, train, measure, venvs
        self.rounds = rounds
        self.python = (
            venvs / "bergson" / "bin" / "python" if name == "gpt2" else Path(sys.executable)
        )

    def turns(self, peer: str, job: str) -> tuple[Result, Result]:
        """The peer's job, and ours on the layers that it covers. Raises Failed."""
        python = self.python if peer == "ours" else self.venvs / peer / "bin" / "python"
        environment = python.parent.parent
        if python != Path(sys.executable) and not (environment / "installed").exists():
            raise Failed(f"not installed: make bench-peers says why {environment.name} is not")
        begin = time.perf_counter()
        theirs = self.measure.run(python, peer, job, self.name, self.train)
        slow = time.perf_counter() - begin > self.measure.limit / 3
        ours = self._ours(theirs.layers)
        for _ in range(1, 1 if slow else self.rounds):
            theirs.add(self.measure.run(python, peer, job, self.name, self.train))
            ours.add(self._ours(theirs.layers))
        return theirs, ours

    def _ours(self, layers: tuple[str, ...]) -> Result:
        return self.measure.run(self.python, "ours", "none", self.name, self.train, layers)

    def row(self, peer: str, job: str, what: str) -> str:
        version, cells = "", [""] * 8
        try:
            if (peer, job, self.name) in CANNOT:
                raise Failed(f"could not run: {CANNOT[peer, job, self.name]}")
            theirs, ours = self.turns(peer, job)
            version, unit = theirs.version, theirs.floor[WALL] * theirs.checkpoints
            apart = np.abs(theirs.scores - ours.scores).max() / np.abs(ours.scores).max()
            alike = np.corrcoef(theirs.scores.ravel(), ours.scores.ravel())[0, 1]
            cells = [
                f"{theirs.least(WALL):,.3g}",
                f"{theirs.median:,.3g}",
                f"{theirs.least(PROCESSOR):,.3g}",
                f"{theirs.least(WALL) / unit:,.2f}",
                *(f"{theirs.least(clock) / ours.least(clock):,.2f}" for clock in CLOCKS),
                f"{alike:.6f}",
                f"{apart:.0e}",
            ]
        except Failed as failed:
            cells[0] = str(failed)
        return f"| {' | '.join([peer, version, self.name, what, *cells])} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=list(TRAIN))
    parser.add_argument("--peers", nargs="*", default=list(PEERS))
    parser.add_argument("--train", type=int, help=f"training examples (default: {TRAIN})")
    parser.add_argument(
        "--limit", type=float, default=LIMIT, help=f"seconds for one process (default: {LIMIT:g})"
    )
    parser.add_argument("--rounds", type=int, default=1, help="turns of ours and a peer")
    parser.add_argument("--venvs", type=Path, default=HERE.parent / ".venv-peers")
    flags = parser.parse_args()
    print(machine())
    print(
        "Training examples:",
        ", ".join(f"{name} {flags.train or TRAIN[name]:,}" for name in flags.workloads),
        end="\n\n",
    )
    print(
        "| | version | workload | computes | least s | median s | processor s | x floor | x ours | x ours, processor | Pearson | difference |"
        f"\n{'|---' * 12}|"
    )
    for name in flags.workloads:
        workload = Workload(
            name,
            flags.train or TRAIN[name],
            Measure(flags.limit),
            flags.venvs.absolute(),
            flags.rounds,
        )
        jobs = [("ours", job, what) for job, what in OURS.items()]
        jobs += [
            (peer, job, what)
            for peer in flags.peers
            for job, what in PEERS[peer].items()
            if name != "gpt2" or peer == "bergson"
        ]
        for peer, job, what in jobs:
            print(workload.row(peer, job, what), flush=True)


if __name__ == "__main__":
    main()
