"""The table of all pairs: `score --top all` of a linear model, as CSV with labels and no texts.

python benchmarks/pairs.py [--train 100000] [--queries 100]

Whole processes. The pairs, the seconds, and the peak memory of the process and its children.
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

DEFINITION = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def model(): return nn.Linear(8, 4)

def examples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, torch.randint(4, (count,), generator=generator))

def train_data(): return examples({train}, 0)
def query_data(): return examples({queries}, 1)
def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
def label(example): return int(example[1])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=100)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        (run / "definition.py").write_text(DEFINITION.format(**vars(flags)))
        (run / "checkpoints").mkdir()
        torch.manual_seed(0)
        weights = {"weight": torch.randn(4, 8), "bias": torch.zeros(4)}
        save_file(weights, run / "checkpoints" / "step-1.safetensors", {"learning_rate": "0.1"})
        command = [sys.executable, "-m", "influence_cli", "score", name, "--top", "all"]
        begin = time.perf_counter()
        subprocess.run([*command, "-o", str(run / "all.csv"), "--quiet"], check=True)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
        size = (run / "all.csv").stat().st_size >> 20
    print(
        f"{flags.train * flags.queries:,} pairs: {seconds:.1f} s, peak {peak} MB, {size} MiB of CSV"
    )


if __name__ == "__main__":
    main()
