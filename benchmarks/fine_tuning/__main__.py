"""Trainings with dropout: each is recorded by one added line, replayed, and retrained by tsloo.

    python benchmarks/fine_tuning --data FOLDER [bert lora lightning loop] [--removals 60]
    python benchmarks/fine_tuning --cost

--cost measures what recording adds to a training step of Trainer. FOLDER has subjectivity.csv.gz,
fashion_mnist_15k.npz and tinyshakespeare.txt.gz (runs.py).
"""

import argparse
import csv
import io
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*runs.RUNS, []], default=[])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--removals", type=int, default=60)
    parser.add_argument("--cost", action="store_true", help="of recording a step of Trainer")
    options = parser.parse_args()
    if options.cost:
        measure_cost()
        return
    if options.data is None:
        parser.error("--data FOLDER: the folder with the data sets")
    print("| run | steps | replay | trainings | removals | late | tracin | noise |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name in options.names or runs.RUNS:
            print_row(name, options, Path(folder) / name)


def print_row(name: str, options: argparse.Namespace, folder: Path) -> None:
    """`replay`: the largest relative distance to a checkpoint. `trainings`: the time of unroll
    --replay for 20 queries in trainings. `removals`, `late`: mean Spearman of unroll with
    retraining, for removals at all steps and at the steps after the second last checkpoint.
    `noise`: the noise of retraining relative to the size of the effects.
    """
    folder.mkdir()
    started = time.perf_counter()
    run = runs.RUNS[name](options.data, folder)
    print(f"{name}: trained in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    steps = sum(1 for _ in (run / "trajectory.jsonl").open()) - 1
    score = influence("score", run, "--method", "unroll", "--replay", "--queries", "0:20")
    distance = re.search(r"bit for bit|relative distance is (\S+)", score.stderr)
    trainings = re.search(
        r"about (\S+) trainings",
        influence("inspect", run, "--method", "unroll", "--replay", "--queries", "0:20").stdout,
    )
    figures = tsloo(run, options.removals)
    late = tsloo(run, options.removals, "--checkpoints", str(link_late_checkpoints(run)))
    noise = figures["retraining", "noise"] / figures["retraining", "effect"]
    cells = [
        name,
        steps,
        distance[1] or "0" if distance else "?",
        trainings[1] if trainings else "?",
        f"{figures['unroll', 'spearman']:.3f}",
        f"{late['unroll', 'spearman']:.3f}",
        f"{figures['tracin', 'spearman']:.3f}",
        f"{noise:.1g}",
    ]
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def tsloo(run: Path, removals: int, *flags: str) -> dict[tuple[str, str], float]:
    methods = ("--method", "unroll", "--replay", "--method", "tracin")
    done = influence(
        "evaluate", run, "tsloo", *methods, "--removals", str(removals), "--queries", "0:20", *flags
    )
    rows = csv.DictReader(io.StringIO(done.stdout))
    return {(row["method"], row["figure"]): float(row["value"]) for row in rows}


def link_late_checkpoints(run: Path) -> Path:
    """A folder with the last two checkpoints."""
    late = run / "late"
    late.mkdir()
    for path in sorted((run / "checkpoints").iterdir())[-2:]:
        (late / path.name).symlink_to(path.resolve())
    return late


def influence(command: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "influence_cli", command, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"influence {command}: {done.stderr}")
    return done


# ---------------------------------------------------------------- cost
def measure_cost(steps: int = 40) -> None:
    """CPU seconds in the functions of the recorder, and in all of a training, by step.

    A comparison of two trainings would have to tell 1 % apart.
    """
    print("| model | step | recording | share |")
    print("|---|---|---|---|")
    for label, sizes in (("BERT, 1 M parameters", (2, 128)), ("BERT, 8 M parameters", (6, 320))):
        with tempfile.TemporaryDirectory() as folder:
            trainer = runs.cost_trainer(Path(folder), *sizes, steps)
            own, complete = runs.time_recording(trainer)
        step, recording = statistics.median(complete), statistics.median(own)
        share = recording / step
        print(f"| {label} | {step * 1e3:.1f} ms | {recording * 1e3:.2f} ms | {share:.2%} |")


if __name__ == "__main__":
    main()
