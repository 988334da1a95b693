"""Does `influence inspect` predict what `influence cache` then takes? Disk, memory and time, predicted against measured.

python benchmarks/predict.py [w1 w2 w3 w4] [--train N]
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

from common import machine, peak_mb, workload

INFLUENCE = [str(Path(sys.executable).with_name("influence"))]
UNITS = {"B": 1e-6, "KB": 1e-3, "MB": 1.0, "GB": 1e3, "TB": 1e6, "s": 1.0, "min": 60.0, "h": 3600.0}


def number(text: str, pattern: str) -> float:
    """The number with a unit that `pattern` finds: in MB or seconds."""
    match = re.search(pattern, text)
    assert match, f"inspect no longer says {pattern}"
    return float(match[1].replace(",", "")) * UNITS[match[2]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", default=["w1", "w2", "w3"])
    parser.add_argument("--train", type=int)
    flags = parser.parse_args()
    print(machine())
    print(
        "| | disk: predicted | found | memory: predicted | found | time: predicted | found |\n|---|---|---|---|---|---|---|"
    )
    for name in flags.workloads:
        with workload(name, flags.train) as (_, run):
            said = subprocess.run(
                [*INFLUENCE, "inspect", str(run)], capture_output=True, text=True, check=True
            ).stdout
            start, _ = peak_mb(
                [
                    *INFLUENCE,
                    "cache",
                    str(run),
                    "--train",
                    "0",
                    "--queries",
                    "0",
                    "--steps",
                    "100",
                    "--cache",
                    str(run / "x"),
                ]
            )
            seconds, peak = peak_mb([*INFLUENCE, "cache", str(run)])
            size = (
                sum(path.stat().st_size for path in (run / ".influence").rglob("*.safetensors"))
                / 1e6
            )
            disk = number(said, r"([\d.,]+) (\w+) to store")
            memory = number(said, r"memory +about ([\d.,]+) (\w+)")
            time = number(said, r"time to compute +about ([\d.,]+) (\w+)")
            print(
                f"| {name} | {disk:,.0f} MB | {size:,.0f} | {memory:,.0f} MB | {peak:,.0f} | {time:.1f} s | {seconds - start:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
