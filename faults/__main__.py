"""python -m faults [--minutes M] [--parts inputs ...]: runs the campaign, prints its table."""

import argparse
from pathlib import Path

from faults.inputs import run_inputs
from faults.tally import format_causes, format_table

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->"
INPUTS_PER_MINUTE = 1_000_000 / 30


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="write the table to README.md")
    flags = parser.parse_args()
    tallies = run_inputs(int(INPUTS_PER_MINUTE * flags.minutes), 60 * flags.minutes, flags.seed)
    table, causes = format_table(tallies), format_causes(tallies)
    print(table, causes, sep="\n\n")
    if flags.write:
        before, rest = README.read_text().split(BEGIN)
        after = rest.partition(END)[2]
        README.write_text(f"{before}{BEGIN}{table}\n{END}{after}")
    return 0 if all(tally.is_clean for tally in tallies) else 1


if __name__ == "__main__":
    raise SystemExit(main())
