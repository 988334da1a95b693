"""What recording costs of a training step: the line of each step, and a checkpoint every 100 of them.

python benchmarks/recorder.py [digits w1 w2 w3 w4] [--repeats 3] [--every 100]

Plain and recorded training take turns, in blocks of `every` steps of one process; a recorded block saves one checkpoint. *line* and
*checkpoint*: medians of what recorder.step() takes without and with one. Shares are of a plain step: of the line, of the checkpoint spread
over `every` steps, and of both. *recorded / plain*: least seconds of a whole block, which shows what else recording might disturb.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine
from torch import Tensor
from workloads import Work

from influence_cli import TrajectoryRecorder

BATCH = {"digits": 64, "w1": 64, "w2": 32, "w3": 32, "w4": 8}


def training(name: str) -> tuple[torch.nn.Module, int, Callable[[Tensor], Tensor]]:
    """The model, the number of examples, and the mean loss of those with given ids."""
    if name == "digits":
        sys.path.insert(0, str(Path(__file__).parents[1] / "sample_runs" / "digits"))
        import definition

        model, (images, labels, truth) = definition.model(), definition.train_data().tensors
        return (
            model,
            len(images),
            lambda ids: definition.loss(model, (images[ids], labels[ids], truth[ids])).mean(),
        )
    work = Work(name)
    return (
        work.model,
        len(work.xtr),
        lambda ids: work.loss_each(work.model(work.xtr[ids]), work.ytr[ids]).mean(),
    )


def measure(name: str, repeats: int, every: int, folder: Path) -> str:
    model, train, loss = training(name)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    seconds: dict[str, list[float]] = {"line": [], "checkpoint": [], "plain": [], "recorded": []}

    def block(record: Callable[[Tensor], None] | None) -> float:
        begun = time.perf_counter()
        for _ in range(every):
            ids = torch.randint(train, (BATCH[name],))
            optimizer.zero_grad()
            loss(ids).backward()
            if record:
                record(ids)
            optimizer.step()
        return time.perf_counter() - begun

    with TrajectoryRecorder(folder, model, optimizer, every) as recorder:

        def record(ids: Tensor) -> None:
            kind = "line" if recorder.steps % every else "checkpoint"
            begun = time.perf_counter()
            recorder.step(ids)
            seconds[kind].append(time.perf_counter() - begun)

        for _ in range(repeats):
            seconds["plain"].append(block(None))
            seconds["recorded"].append(block(record))
    step = min(seconds["plain"]) / every
    line, checkpoint = statistics.median(seconds["line"]), statistics.median(seconds["checkpoint"])
    size = sum(own.numel() * own.element_size() for own in model.parameters()) / 1e6
    return (
        f"| {name} | {BATCH[name]} | {size:.2f} | {step * 1e3:.3g} | {line * 1e6:.0f} | {checkpoint * 1e3:.2f} | {line / step:.2%} "
        f"| {checkpoint / every / step:.2%} | {(line + checkpoint / every) / step:.2%} "
        f"| {min(seconds['recorded']) / min(seconds['plain']):.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=["digits", "w1", "w2", "w3", "w4"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--every", type=int, default=100)
    flags = parser.parse_args()
    print(machine())
    print(
        "| | batch | MB | step, ms | line, us | checkpoint, ms | line | checkpoint | both | recorded / plain |\n"
        + "|---" * 10
        + "|"
    )
    for name in flags.names:
        folder = Path(tempfile.mkdtemp(prefix="influence-recorder-"))
        try:
            print(measure(name, flags.repeats, flags.every, folder), flush=True)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
