"""Digests of what every method and command prints on both sample runs: a refactoring must not change one byte.

    python benchmarks/digests.py > before.txt
    ... change the code ...
    python benchmarks/digests.py --compare before.txt      exit code 1 and the commands whose bytes differ

`--checkout DIR` runs the package of another checkout (`git worktree add DIR COMMIT`) on this checkout's sample runs.
Digests are compared on one machine only: another processor rounds differently.
"""

import argparse
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("tracin", "grad-dot", "grad-cos", "dve", "unroll --replay")
DIGITS = (
    *(f"score digits --method {method} --queries 57,3 --top 5" for method in METHODS),
    *(f"score digits --method {method} --queries 57 --top all" for method in ("tracin", "dve")),
    *(f"score digits --method {method} --by layer --queries 57 --top 3" for method in METHODS),
    *(f"score digits --method {method} --by checkpoint --queries 57 --top 3" for method in METHODS),
    *(
        f"score digits --method {method} --by step --queries 57 --top 2"
        for method in ("dve", "unroll --replay")
    ),
    "score digits --method dve --curvature none --queries 57 --top 3",
    "score digits --method dve --form embedding --queries 57 --top 3 --train 0:200 --steps 480: --layers 2.*",
    "score digits --method dve --replay --at 240 --queries 57 --top 3",
    "score digits --method unroll --replay --renormalize --at 240 --queries 57 --top 3",
    "score digits --normalize --queries 0:4 --top 3",
    "score digits --sum-queries --top 5",
    "score digits --group-by label --queries 0:4 --top all",
    "score digits --lr-weights segment --queries 0:4 --top 3 --format jsonl",
    "score digits --project 64 --queries 0:4 --top 5",
    "score digits --project 64 --projection sparse --seed 3 --queries 0:4 --top 5",
    "score digits --store int8 --queries 0:4 --top 5",
    "score digits --cache none --queries 0:4 --top 5 --format tsv",
    "score digits --precision float64 --queries 0:2 --top 5",
    "self digits --top 20",
    "self digits --top all",
    "trace digits --queries 57 --train 387",
    "trace digits --queries 57 --train 387 --method unroll --replay --at 240",
    "evaluate digits tsloo --removals 6 --queries 0:5 --method dve --method tracin --format csv",
)
WORDS = (
    *(
        f"score words --method {method} --queries 0 --top 5"
        for method in ("tracin", "grad-dot", "tracin-we")
    ),
    "score words --method tracin-we --by word --queries 0:3 --top 3",
    "score words --method tracin-we --by checkpoint --queries 0:3 --top 3",
    "score words --method tracin-we --special-tokens drop --top-words 5 --queries 0:3 --top 3 --by word",
    "score words --method tracin-we --synonyms 3 --queries 0:3 --top 3 --by word",
    "score words --by layer --queries 0:3 --top 3",
    "self words --top 20",
)
CHECKS = ("check digits", "check words")
SHARDS = (
    "score digits --queries 0:5 --top 6",
    "score digits --queries 0:5 --top all",
    "self digits --top 15",
)
RANKS = (
    "score digits --queries 0:5 --top 6 --by layer",
    "score words --method tracin-we --by word --queries 0:3 --top 3",
    "score digits --method dve --queries 57 --top 3",
    "self digits --top 15",
)


class Runner:
    """Runs commands of one checkout in a folder that holds copies of the sample runs."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "160",
        }
        for name in ("digits", "words"):
            shutil.copytree(
                ROOT / "sample_runs" / name,
                folder / name,
                ignore=shutil.ignore_patterns(".influence"),
            )

    def output(self, *words: str, launch: tuple[str, ...] = ()) -> bytes:
        command = [sys.executable, *launch, "-m", "influence_cli", *words]
        done = subprocess.run(command, cwd=self.folder, env=self.environ, capture_output=True)
        if done.returncode:
            sys.exit(
                f"{shlex.join(words)}: exit code {done.returncode}\n{done.stderr.decode()}"
            )  # a case must be one that works
        return re.sub(rb", [0-9.]+ s", b"", done.stdout)  # the cost of evaluate

    def shards(self, line: str) -> bytes:
        parts = [f"part-{number}.csv" for number in (1, 2, 3)]
        for number, part in enumerate(parts, start=1):
            self.output(*shlex.split(line), "--shard", f"{number}/3", "-o", part)
        top = line.split("--top ")[1].split()[0]
        return self.output("merge", *parts, "--top", top)

    def ranks(self, line: str) -> bytes:
        launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        return self.output(*shlex.split(line), launch=launch)


def outputs(runner: Runner):
    """Each command and the bytes that it prints, in an order that also meets warm caches."""
    for line in (*DIGITS, *WORDS, *CHECKS):
        yield line, runner.output(*shlex.split(line))
    for line in SHARDS:
        yield f"3 shards + merge: {line}", runner.shards(line)
    for line in RANKS:
        yield f"torchrun 2 ranks: {line}", runner.ranks(line)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkout",
        type=Path,
        default=ROOT,
        metavar="DIR",
        help="the checkout whose package runs (default: this one)",
    )
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="digests that were printed before"
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="also write each output to DIR, as 000.txt, 001.txt, ...",
    )
    flags = parser.parse_args()
    before = (
        dict(reversed(line.split("  ", 1)) for line in flags.compare.read_text().splitlines())
        if flags.compare
        else {}
    )
    different = 0
    with tempfile.TemporaryDirectory(prefix="influence-digests-") as folder:
        for number, (line, content) in enumerate(
            outputs(Runner(flags.checkout.resolve(), Path(folder)))
        ):
            digest = hashlib.sha256(content).hexdigest()[:16]
            changed = bool(before) and before.get(line) != digest
            different += changed
            print(f"{digest}  {line}{'  CHANGED' if changed else ''}", flush=True)
            if flags.keep:
                flags.keep.mkdir(parents=True, exist_ok=True)
                (flags.keep / f"{number:03d}.txt").write_bytes(content)
    if before:
        print(f"{different} of {len(before)} outputs differ", file=sys.stderr)
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
