"""Is memory flat in the number of examples? python benchmarks/memory.py [N ...]

Runs `influence score` on synthetic runs of 10^4 and 10^6 examples (a model of 5 parameters, so that examples are all there is), first
computing and caching the gradients, then scoring again from the cache; prints seconds and the peak memory of each process.
"""

import os
import platform
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

class Numbers(torch.utils.data.Dataset):
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def __getitem__(self, i): return torch.tensor([i % 7, i % 11, i % 13, 1.0 + i % 3]), float(i % 5)

def model(): return nn.Linear(4, 1)
def train_data(): return Numbers({count})
def query_data(): return Numbers(4)
def loss(model, batch): return (model(batch[0])[:, 0] - batch[1].float()).square()
"""
CASES = {
    "compute and score --top 10": ["--top", "10"],
    "score again --top 10": ["--top", "10"],
    "score again --top all": ["--top", "all", "-o", "all.csv"],
    "score --cache none": ["--top", "10", "--cache", "none"],
}


def peak(arguments: list[str], folder: Path) -> tuple[float, float]:
    """Seconds and peak resident MB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "influence_cli", *arguments], cwd=folder, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, arguments
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    counts = [int(float(count)) for count in sys.argv[1:]] or [10_000, 1_000_000]
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"{'':28}" + "".join(f"{count:>14,} examples" for count in counts))
    results: dict[str, list[str]] = {name: [] for name in CASES}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "checkpoints").mkdir()
            (folder / "definition.py").write_text(DEFINITION.format(count=count))
            torch.manual_seed(0)
            save_file(
                torch.nn.Linear(4, 1).state_dict(),
                folder / "checkpoints" / "step-1.safetensors",
                metadata={"learning_rate": "0.1"},
            )
            for case, flags in CASES.items():
                seconds, megabytes = peak(["score", ".", "--quiet", *flags], folder)
                results[case].append(f"{seconds:9.1f} s {megabytes:7.0f} MB")
    for case, cells in results.items():
        print(f"{case:28}" + "".join(f"{cell:>23}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
