"""Does `influence inspect` predict what `influence score` then takes? Disk, memory and time, predicted against measured.

python benchmarks/predict.py [digits w1 w2 w3 w4] [--train N] [--clock processor]

none: --cache none. disk: a first score, which computes, stores and scores. again: a second one. Times are of whole processes, without that of
one that scores one pair with one checkpoint.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import machine, workload

ROOT = Path(__file__).parents[1]
INFLUENCE = [sys.executable, "-m", "influence_cli"]
# inspect, which measures processor time, so that other jobs on the machine do not count
BY_PROCESSOR = "import time; time.perf_counter = time.process_time; from influence_cli.__main__ import main; main()"
UNITS = {"B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3, "TB": 1e6, "s": 1.0, "min": 60.0, "h": 3600.0}


@contextmanager
def run_folder(name: str, train: int | None) -> Iterator[Path]:
    if name != "digits":
        with workload(name, train) as (_, run):
            yield run
        return
    with tempfile.TemporaryDirectory(prefix="influence-digits-") as folder:
        ignored = shutil.ignore_patterns(".influence")
        yield shutil.copytree(ROOT / "sample_runs" / "digits", Path(folder) / "run", ignore=ignored)


def number(text: str, pattern: str) -> float:
    """The number with a unit that `pattern` finds: in MB or seconds."""
    match = re.search(pattern, text)
    assert match, f"inspect no longer says {pattern}"
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def predicted(run: Path, cache: Path | str, clock: str) -> tuple[float, float, float]:
    """MB of disk and of memory, seconds."""
    program = [sys.executable, "-c", BY_PROCESSOR] if clock == "processor" else INFLUENCE
    text = subprocess.run(
        [*program, "inspect", str(run), "--cache", str(cache)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    disk = 0.0 if cache == "none" else number(text, r"([\d.,]+) (\w+) to store")
    memory = number(text, r"memory +about ([\d.,]+) (\w+)")
    return disk, memory, number(text, r"time to score +about ([\d.,]+) (\w+)")


def score(run: Path, cache: Path | str, clock: str, *flags: str) -> tuple[float, float]:
    """Seconds and peak MB."""
    command = [*INFLUENCE, "score", str(run), "--cache", str(cache), "--quiet", *flags]
    command += ["-o", str(run / "scores.csv")]
    started = time.perf_counter()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    assert not status
    wall = time.perf_counter() - started
    seconds = usage.ru_utime + usage.ru_stime if clock == "processor" else wall
    return seconds, usage.ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def bytes_of(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.safetensors"))


def measured(
    run: Path, way: str, cache: Path, clock: str, repeats: int
) -> tuple[float, float, float]:
    """The same, of `score`."""
    first = min(int(re.sub(r"\D", "", path.stem)) for path in (run / "checkpoints").iterdir())
    pair = ["--train", "0", "--queries", "0", "--steps", str(first)]
    starts, times, peaks, stored = [], [], [], 0
    for _ in range(repeats):
        before = bytes_of(cache)
        if way == "disk":
            shutil.rmtree(cache, ignore_errors=True)
            before = 0
        starts.append(score(run, "none", clock, *pair)[0])
        seconds, peak = score(run, "none" if way == "none" else cache, clock)
        times.append(seconds)
        peaks.append(peak)
        stored = bytes_of(cache) - before
    return stored / 1e6, max(peaks), max(0.0, min(times) - min(starts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["digits", "w1", "w3"])
    parser.add_argument("--train", type=int)
    parser.add_argument("--repeats", type=int, default=3)  # the least time counts
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    flags = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)
    print(f"{machine()}, load {os.getloadavg()[0]:.1f}\n")
    print("| predicted / measured | disk, MB | memory, MB | time, s |\n|---|---|---|---|")
    for name in flags.workloads:
        with run_folder(name, flags.train) as run:
            cache = run / ".influence"
            for way in ("none", "disk", "again"):
                before = predicted(run, "none" if way == "none" else cache, flags.clock)
                after = measured(run, way, cache, flags.clock, flags.repeats)
                pairs = [
                    (f"{a:,.1f}", f"{b:,.1f}") for a, b in zip(before[:2], after[:2], strict=True)
                ]
                cells = [*pairs, (f"{before[2]:.1f}", f"{after[2]:.1f}")]
                print(
                    f"| {name}, {way} | {' | '.join(' / '.join(pair) for pair in cells)} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
