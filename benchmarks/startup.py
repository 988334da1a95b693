"""How long commands take beside `import torch`: whole processes, in turns, least of all rounds.

python benchmarks/startup.py [--rounds 9] [--run sample_runs/digits]

score: on a warm cache. inspect: without the time of its own measurement, which it prints apart. The targets are import torch + 0.6 s
for each. Python's bytecode is written first, as an installation does. Processor time is user and system time.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine

ROOT = Path(__file__).parents[1]
TARGET = 0.6  # seconds beside import torch
# inspect, with the wall and processor time of its measurement on stderr
INSPECT = """
import sys, time
from influence_cli.cli.torch_import import import_torch
import_torch()
from influence_cli.diagnostics import score_estimate
from influence_cli.methods import score_trial
def timed(module, name):
    function = getattr(module, name)
    def call(*arguments):
        wall, processor = time.perf_counter(), time.process_time()
        result = function(*arguments)
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        print("MEASURED", wall, processor, file=sys.stderr)
        return result
    setattr(module, name, call)
timed(score_estimate, "measure")
timed(score_trial, "open_trial")
from influence_cli.__main__ import main
main()
"""
Seconds = tuple[float, float]  # wall, processor


def seconds_of(arguments: list[str]) -> Seconds:
    """Wall and processor seconds of a Python process, without those of a measurement in it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryFile("w+") as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=subprocess.DEVNULL, stderr=stderr
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall, processor = time.perf_counter() - started, usage.ru_utime + usage.ru_stime
        stderr.seek(0)
        text = stderr.read()
    if status:
        sys.exit(text)
    for line in text.splitlines():
        if line.startswith("MEASURED"):
            wall, processor = (
                a - float(b) for a, b in zip((wall, processor), line.split()[1:], strict=True)
            )
    return wall, processor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--run", type=Path, default=ROOT / "sample_runs" / "digits")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="influence-startup-") as folder:
        run = shutil.copytree(
            flags.run, Path(folder) / "run", ignore=shutil.ignore_patterns(".influence")
        )
        score = ["-m", "influence_cli", "score", str(run)]
        jobs = {
            "`import torch`": ["-c", "import torch"],
            "`score`, all queries": score,
            "`score --queries 57`": [*score, "--queries", "57"],
            "`inspect`, without its measurement": ["-c", INSPECT, "inspect", str(run)],
        }
        for arguments in jobs.values():  # fills the cache, and writes the bytecode
            seconds_of(arguments)
        times: dict[str, list[Seconds]] = {name: [] for name in jobs}
        for _ in range(flags.rounds):
            for name, arguments in jobs.items():
                times[name].append(seconds_of(arguments))
    least = {
        name: [min(values) for values in zip(*rounds, strict=True)]
        for name, rounds in times.items()
    }
    base = least["`import torch`"]
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}, least of {flags.rounds}\n")
    print(
        "| | processor | beside import torch | wall | beside import torch |\n|---|---|---|---|---|"
    )
    for name, (wall, processor) in least.items():
        print(
            f"| {name} | {processor:.2f} s | {processor - base[1]:+.2f} | {wall:.2f} s | {wall - base[0]:+.2f} |"
        )


if __name__ == "__main__":
    main()
