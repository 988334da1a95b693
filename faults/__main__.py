"""python -m faults [--minutes M] [--parts inputs ...]: runs the campaign, prints its table."""

import argparse
from pathlib import Path

from faults.flips import run_flips
from faults.inputs import run_inputs
from faults.kills import run_kills
from faults.tally import format_causes, format_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
# part -> its function, trials per minute of the campaign, and its share of the time
PARTS = {
    "kills": (run_kills, 10, 0.4),
    "flips": (run_flips, 50, 0.3),
    "inputs": (run_inputs, 1_000_000 / 30, 0.3),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table to README.md")
    flags = parser.parse_args()
    tallies = []
    for part in flags.parts:
        run, rate, share = PARTS[part]
        tallies += run(int(rate * flags.minutes), 60 * share * flags.minutes, flags.seed)
    table, causes = format_table(tallies), format_causes(tallies)
    print(table, causes, sep="\n\n")
    if flags.write:
        before, rest = README.read_text().split(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}{table}\n{END}{after}")
    return 0 if all(tally.is_clean for tally in tallies) else 1


if __name__ == "__main__":
    raise SystemExit(main())
