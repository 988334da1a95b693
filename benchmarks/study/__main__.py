"""How good are scores? Every method and every protocol on small runs, trained here.

    make study DATA=FOLDER         within an hour on two cores (--full: the slow rows, too)
    python benchmarks/study --data FOLDER [--only gpt-sgd] [--jobs 2] [--full]

It writes results.csv beside this file, docs/study.svg, and the tables of docs/evaluation.md. An
interrupted study resumes. plan.py says what runs, runs.py trains the runs.
"""

import argparse
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from peers import score_with_peers
from plan import FRACTIONS, METHODS, PLANS, SUBSETS, TOP_K, Plan
from report import write_report
from runs import RUNS, build_run

HERE = Path(__file__).parent
COLUMNS = ("run", "method", "protocol", "figure", "value", "low", "high", "n", "cost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path(".study"), help="of runs and scores")
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, one thread each")
    parser.add_argument("--full", action="store_true", help="the slow rows, too")
    options = parser.parse_args()
    plans = [plan for plan in PLANS if not options.only or plan.run in options.only]
    started = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        tables = pool.map(lambda plan: study_run(plan, options), plans)
    rows = [row for table in tables for row in table]
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    if options.only:
        write_rows(sys.stdout, rows)
        return
    with (HERE / "results.csv").open("w") as file:
        write_rows(file, rows)
    write_report(rows)


def write_rows(file: io.TextIOBase, rows: Sequence[dict[str, str]]) -> None:
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


# ---------------------------------------------------------------- one run
def study_run(plan: Plan, options: argparse.Namespace) -> list[dict[str, str]]:
    """All rows of one run. A failed command ends the study of this run, and says so at once."""
    try:
        return measure_run(plan, options)
    except SystemExit as error:
        print(f"{plan.run}: {error}", file=sys.stderr)
        raise


def measure_run(plan: Plan, options: argparse.Namespace) -> list[dict[str, str]]:
    folder = options.folder / plan.run
    run = folder / "run"
    if not run.exists():
        shutil.rmtree(folder / "new", ignore_errors=True)
        build_run(RUNS[plan.run], options.data, folder / "new")
        (folder / "new").rename(run)
    write_wrong_ids(run)
    rows: list[dict[str, str]] = []
    files: dict[str, Path] = {}
    for method in (*plan.methods, *(plan.slow_methods if options.full else ())):
        file = folder / f"{method.replace(' ', '-')}.csv"
        error = score(run, METHODS[method], plan.queries, file)
        if error:
            rows.append(error_row(plan.run, method, error))
        else:
            files[method] = file
    files |= score_with_peers(run, folder, plan.queries)
    rows += [seconds_row(plan.run, method, file) for method, file in files.items()]
    names = {str(file): method for method, file in files.items()}
    for command in commands(plan, files, options.full):
        rows += evaluate(run, folder, command, names)
    return rows


def write_wrong_ids(run: Path) -> None:
    """The known wrong labels of the digits, one id a line."""
    if (run / "flipped.json").exists():
        ids = sorted(map(int, json.loads((run / "flipped.json").read_text())))
        (run / "wrong.txt").write_text("".join(f"{index}\n" for index in ids))


def commands(plan: Plan, files_by_method: dict[str, Path], full: bool) -> Iterator[tuple[str, ...]]:
    """The arguments of `influence evaluate RUN`."""
    files = list(files_by_method.values())
    queries = ("--queries", f"0:{plan.queries}")
    for fraction in FRACTIONS:
        yield ("lds", *map(str, files), "--subsets", str(SUBSETS), "--fraction", fraction, *queries)
    deletions = plan.slow_deletions if full else plan.deletions
    if deletions:
        yield ("deletion", *map(str, files), "--top-k", TOP_K, "--queries", f"0:{deletions}")
    removals = plan.slow_removals if full else plan.removals
    if removals:
        for method, *flags in plan.tsloo:
            if " ".join((method, *flags)) not in files_by_method:
                continue  # it refuses this run
            yield ("tsloo", "--method", method, *flags, "--removals", str(removals), *queries)
    if plan.mislabel:
        yield ("mislabel", "--method", "tracin", "--method", "grad-dot", *plan.mislabel)


# ---------------------------------------------------------------- commands
def influence(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, run in the run folder with one thread."""
    print(f"{run.parent.name}: influence {' '.join(arguments)}"[:150], file=sys.stderr)
    return subprocess.run(
        [sys.executable, "-m", "influence_cli", *arguments],
        cwd=run,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def score(run: Path, flags: Sequence[str], queries: int, file: Path) -> str:
    """Writes the scores of all pairs, and beside them the seconds of the command without a cache.

    Returns the error of a method that refuses the run, else nothing.
    """
    if file.exists():
        return ""
    failure = file.with_suffix(".error")
    if not failure.exists():
        arguments = ("score", ".", *flags, "--queries", f"0:{queries}", "--top", "all")
        new = file.with_suffix(".new.csv").resolve()
        started = time.perf_counter()
        result = influence(run, *arguments, "--quiet", "--cache", "none", "-o", str(new))
        if result.returncode == 0:
            file.with_suffix(".seconds").write_text(f"{time.perf_counter() - started:.2f}")
            new.rename(file)
            return ""
        if result.returncode != 1:
            raise SystemExit(result.stderr)
        failure.write_text(result.stderr)
    lines = [line for line in failure.read_text().splitlines() if line.startswith("error: ")]
    return lines[0].removeprefix("error: ")


def error_row(run: str, method: str, error: str) -> dict[str, str]:
    row = {"run": run, "method": method, "protocol": "score", "figure": "seconds", "cost": error}
    return dict.fromkeys(COLUMNS, "") | row


def seconds_row(run: str, method: str, file: Path) -> dict[str, str]:
    value = file.with_suffix(".seconds").read_text()
    row = {"run": run, "method": method, "protocol": "score", "figure": "seconds", "value": value}
    return dict.fromkeys(COLUMNS, "") | row


def evaluate(
    run: Path, folder: Path, command: Sequence[str], names: dict[str, str]
) -> Iterator[dict[str, str]]:
    """The rows of one command. Its output is stored, so that the next study reads it."""
    own = [argument for argument in command if argument not in names]
    file = folder / f"{'-'.join(own).replace('--', '').replace('%', '')}.result"
    if not file.exists():
        paths = [str(Path(a).resolve()) if a in names else a for a in command]
        result = influence(run, "evaluate", ".", *paths)
        if result.returncode:
            raise SystemExit(result.stderr)
        file.with_suffix(".new").write_text(result.stdout)
        file.with_suffix(".new").rename(file)
    protocol = command[0]
    if "--fraction" in command:
        protocol += f" {command[command.index('--fraction') + 1]}"
    resolved = {str(Path(path).resolve()): name for path, name in names.items()}
    for row in csv.DictReader(io.StringIO(file.read_text())):
        method = resolved.get(row["method"], row["method"])
        if protocol == "tsloo" and "--replay" in command and method != "retraining":
            method += " --replay"
        yield row | {"run": folder.name, "method": method, "protocol": protocol}


if __name__ == "__main__":
    main()
