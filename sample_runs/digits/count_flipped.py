"""How many of the highest self-influences are of flipped labels: influence self sample_runs/digits --top 40 | python count_flipped.py"""

import csv
import json
import sys
from pathlib import Path

flipped = {int(index) for index in json.loads((Path(__file__).parent / "flipped.json").read_text())}
found = [int(row["train"]) in flipped for row in csv.DictReader(sys.stdin)]
first = found.index(False) if False in found else len(found)
print(f"{sum(found)} of the {len(found)} highest are flipped; the first {first} all are")
