"""Our whole job beside public peers', each in a virtual environment of its own: `make bench-peers` makes them.

python benchmarks/peers.py [w1 w2 w3 w4 gpt2] [--peers captum ...] [--train N] [--limit SECONDS] [--clock wall|processor] [--venvs DIR]

A job is the scores of all queries against all training examples over all checkpoints, and the top 10 of each query. Each runs in a process
of its own (peers/job.py; imports, data and models are not timed) with its floor, one forward+backward of the training examples, in turns
with it: `x floor` is seconds / (floor x checkpoints). `x ours` is to our `--cache none` on the layers that the peer covers, and Pearson and
difference (largest absolute one / largest exact score) are to those scores of ours. `--clock processor`, one thread and its processor
seconds, is for a machine that others use as well; waiting for a disk is not in it. gpt2 is W4's size as a Hugging Face model, for bergson;
ours then runs in bergson's environment, which has transformers.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
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


class Failed(Exception):
    """Why a job has no row of numbers."""


@dataclass(frozen=True)
class Result:
    seconds: float
    floor: float
    checkpoints: int
    version: str
    layers: tuple[str, ...]
    scores: np.ndarray  # (Q, N)


@dataclass(frozen=True)
class Measure:
    limit: float  # seconds for a process
    clock: str  # wall or processor

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
            given = [runner, job, workload, str(train), folder, self.clock, *layers]
            out = self._started([str(python), "-P", str(HERE / "peers" / "job.py"), *given])
            found = json.loads(out.splitlines()[-1])
            scores = np.load(Path(folder) / "scores.npy")
        return Result(
            found["seconds"],
            found["floor"],
            found["checkpoints"],
            found["version"],
            tuple(found["layers"]),
            scores,
        )

    def _started(self, command: list[str]) -> str:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        patience, soft = self.limit, None
        if self.clock == "processor":
            environment["OMP_NUM_THREADS"] = "1"
            seconds = int(self.limit)
            patience, soft = (
                20 * self.limit,
                lambda: resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1)),
            )
        process = subprocess.Popen(
            command,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            preexec_fn=soft,
        )
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            raise Failed(f"over {self.limit:g} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if process.returncode == -signal.SIGXCPU:
            raise Failed(f"over {self.limit:g} s")
        if process.returncode:
            lines = err.strip().splitlines() or [f"exit status {process.returncode}"]
            raise Failed(f"could not run: {lines[-1][:120]}")
        return out


class Workload:
    """One workload, and ours on it: for each set of layers, once."""

    def __init__(self, name: str, train: int, measure: Measure, venvs: Path) -> None:
        self.name, self.train, self.measure, self.venvs = name, train, measure, venvs
        self.python = (
            venvs / "bergson" / "bin" / "python" if name == "gpt2" else Path(sys.executable)
        )
        self.exact: dict[tuple[str, ...], Result] = {}

    def ours(self, layers: tuple[str, ...]) -> Result:
        if layers not in self.exact:
            self.exact[layers] = self.measure.run(
                self.python, "ours", "none", self.name, self.train, layers
            )
        return self.exact[layers]

    def row(self, peer: str, job: str, what: str) -> str:
        version, cells = "", ["", "", "", "", ""]
        try:
            if (peer, job, self.name) in CANNOT:
                raise Failed(f"could not run: {CANNOT[peer, job, self.name]}")
            python = self.python if peer == "ours" else self.venvs / peer / "bin" / "python"
            if (
                python != Path(sys.executable)
                and not python.parent.parent.joinpath("installed").exists()
            ):
                raise Failed(
                    f"not installed: make bench-peers says why {python.parent.parent.name} could not be"
                )
            done = (
                self.ours(())
                if (peer, job) == ("ours", "none")
                else self.measure.run(python, peer, job, self.name, self.train)
            )
            version, exact = done.version, self.ours(done.layers)
            unit = done.floor * done.checkpoints
            apart = np.abs(done.scores - exact.scores).max() / np.abs(exact.scores).max()
            alike = np.corrcoef(done.scores.ravel(), exact.scores.ravel())[0, 1]
            ratios = [f"{done.seconds / unit:,.1f}", f"{done.seconds / exact.seconds:,.1f}"]
            cells = [f"{done.seconds:,.3g}", *ratios, f"{alike:.6f}", f"{apart:.0e}"]
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
        "--limit", type=float, default=300, help="seconds for one process (default: 300)"
    )
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--venvs", type=Path, default=HERE.parent / ".venv-peers")
    flags = parser.parse_args()
    print(
        f"{machine()}; {flags.clock} seconds{' of one thread' if flags.clock == 'processor' else ''}"
    )
    print(
        "Training examples:",
        ", ".join(f"{name} {flags.train or TRAIN[name]:,}" for name in flags.workloads),
        end="\n\n",
    )
    print(
        "| | version | workload | computes | seconds | x floor | x ours | Pearson | difference |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name in flags.workloads:
        workload = Workload(
            name,
            flags.train or TRAIN[name],
            Measure(flags.limit, flags.clock),
            flags.venvs.absolute(),
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
