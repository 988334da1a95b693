"""python -m faults [--minutes M] [--full] [--parts kills inputs ...]: runs the campaign.

PARTS is the campaign. To add a part, write `run_NAME(count, seconds, seed)` in faults/NAME.py and
add one line to PARTS. Parts of two lanes run at the same time. The function makes `count` trials, or as many as it can in `seconds`. It
returns one Tally per row of the table. It sets `tally.target` to the trials that it should make:
the table then shows where time was too short. What a part counts is its own choice: signals,
inputs, or the seconds of a soak.
"""

import argparse
import datetime
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from faults.disk import run_disk
from faults.flips import run_flips
from faults.inputs import run_inputs
from faults.kills import run_kills
from faults.ranks import run_ranks
from faults.sanity import run_sanity
from faults.soak import run_soak
from faults.tally import Clock, Tally, format_causes, format_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
QUICK_MINUTES, FULL_MINUTES = 30, 240


@dataclass(frozen=True)
class Part:
    """`lane`: its parts run one after the other, beside those of the other lane. `share`: of the
    time, relative to the other parts of its lane. A part that is ready early leaves its time to the
    parts below it.
    """

    lane: int
    run: Callable[[int, float, int], list[Tally]]  # (count, seconds, seed)
    share: float
    quick: int  # trials in 30 minutes; fewer in less time
    full: int  # trials with --full, and in 240 minutes or more

    def count(self, minutes: float, full: bool) -> int:
        if full or minutes >= FULL_MINUTES:
            return self.full
        return max(1, int(self.quick * min(1.0, minutes / QUICK_MINUTES)))


PARTS = {
    #          lane, function, share, quick, full
    "kills": Part(1, run_kills, 0.3, 300, 1_000),
    "ranks": Part(1, run_ranks, 0.15, 60, 240),
    "disk": Part(1, run_disk, 0.25, 200, 1_000),
    "flips": Part(2, run_flips, 0.65, 1_500, 12_000),  # bytes of tensors; and headers
    "sanity": Part(1, run_sanity, 0.2, 500, 5_000),
    "soak": Part(1, run_soak, 0.09, 120, 1_200),  # seconds
    "inputs": Part(2, run_inputs, 0.35, 1_000_000, 10_000_000),
}


def run_lanes(names: list[str], minutes: float, full: bool, seed: int) -> list[Tally]:
    """Runs the parts of each lane in a process of its own. The tallies are in the order of PARTS."""
    lanes = [[name for name in names if PARTS[name].lane == lane] for lane in (1, 2)]
    jobs = [(lane, minutes, full, seed) for lane in lanes if lane]
    if len(jobs) == 1:
        done = run_parts(*jobs[0])
    else:
        with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("fork")) as pool:
            futures = [pool.submit(run_parts, *job) for job in jobs]
            done = {name: part for future in futures for name, part in future.result().items()}
    return [tally for name in PARTS if name in done for tally in done[name]]


def run_parts(names: list[str], minutes: float, full: bool, seed: int) -> dict[str, list[Tally]]:
    """Runs the parts one after the other, within the time."""
    clock = Clock(60 * minutes)
    done: dict[str, list[Tally]] = {}
    for at, name in enumerate(names):
        part = PARTS[name]
        share = part.share / sum(PARTS[later].share for later in names[at:])
        remaining = max(0.0, 60 * minutes - clock.seconds)
        try:
            done[name] = part.run(part.count(minutes, full), share * remaining, seed)
        except Exception as error:  # the other parts still run
            done[name] = [Tally(name)]
            done[name][0].crash(error, traceback.format_exc())
        print(f"{name}: {clock.seconds / 60:.1f} minutes", flush=True)
    return done


def describe_run(arguments: list[str], seconds: float) -> str:
    """One line: the command, and how long it took on what."""
    command = " ".join(["python -m faults", *arguments])
    today = datetime.date.today().isoformat()
    return (
        f"`{command}` made this table in {seconds / 60:.0f} minutes, on a machine of "
        f"{os.cpu_count()} cores, on {today}."
    )


def replace_table(text: str, how: str, table: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{how}\n\n{table}\n{END}{rest.partition(END)[2]}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=QUICK_MINUTES)
    parser.add_argument(
        "--full", action="store_true", help="the counts of 240 minutes, in any time"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table to README.md")
    flags = parser.parse_args()
    clock = Clock(0.0)
    tallies = run_lanes(flags.parts, flags.minutes, flags.full, flags.seed)
    table, causes = format_table(tallies), format_causes(tallies)
    print(table, causes, sep="\n\n")
    if flags.write:
        how = describe_run(sys.argv[1:], clock.seconds)
        README.write_text(replace_table(README.read_text(), how, table))
    return 0 if all(tally.is_clean for tally in tallies) else 1


if __name__ == "__main__":
    raise SystemExit(main())
