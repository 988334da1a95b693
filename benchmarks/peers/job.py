"""One job of one runner in one environment: python -P benchmarks/peers/job.py RUNNER JOB WORKLOAD N_TRAIN FOLDER [LAYERS...]

Measures the floor, runs the job two to five times within 2 seconds (once where it takes 12), and measures the floor again; saves the scores (Q, N) as FOLDER/scores.npy and prints
one JSON line: wall and processor seconds of each run, the least of the floor, the package's version, and the layers that count (none: all
parameters). OMP_NUM_THREADS sets the threads.

A runner is a file beside this one with PACKAGE and JOBS: functions of (work, folder, layers), called before each run and not timed. They
return the callable that is timed, which returns the scores, and the layers. -P keeps this folder off the import path: its files have the
names of the packages.
"""

import json
import runpy
import sys
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import nn
from workloads import Work, floor_seconds

FLOOR_BATCHES = {
    "w1": (256, 1000),
    "w2": (32, 64),
    "w3": (32, 64, 250),
    "w4": (8, 16),
    "gpt2": (8, 16),
}
BATCH = {
    "w1": 500,
    "w2": 100,
    "w3": 100,
    "w4": 32,
    "gpt2": 32,
}  # examples a batch for peers; tried on w1 only
REPEATS, ENOUGH, SLOW = 5, 2.0, 12.0  # a job runs twice, unless the first run is slow
FLOOR, ROUND = 0.8, 0.1  # seconds of all floors, and of one


def load(name: str, train: int) -> Work:
    work = (
        runpy.run_path(str(Path(__file__).with_name("gpt2.py")))["Work"](train)
        if name == "gpt2"
        else Work(name, train)
    )
    work.batch = BATCH[name]
    plain = {
        key: module
        for key, module in work.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    uses = Counter(
        id(module.weight)
        for module in work.model.modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
    )
    work.plain = [
        key for key, module in plain.items() if uses[id(module.weight)] == 1
    ]  # a tied weight's gradient has another part
    return work


def spent(taken: list[tuple[float, float]]) -> float:
    return sum(wall for wall, _ in taken)


def seconds_of(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of a call."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def floor_of(work: Work) -> tuple[float, float]:
    """Wall and processor seconds of one forward+backward over the training set: the least at any batch size.

    A round repeats until ROUND seconds have passed: some systems count processor time in ticks of 10 ms.
    """
    rounds = []
    for batch in FLOOR_BATCHES[work.name]:
        begin = time.perf_counter()
        while time.perf_counter() - begin < FLOOR / len(FLOOR_BATCHES[work.name]):
            passes = []
            while sum(wall for wall, _ in passes) < ROUND:
                passes.append(seconds_of(lambda batch=batch: floor_seconds(work, batch, 1)))
            rounds.append([sum(one) / len(passes) for one in zip(*passes, strict=True)])
    wall, processor = (min(one) for one in zip(*rounds, strict=True))
    return wall, processor


def main() -> None:
    name, job, workload, train, folder, *layers = sys.argv[1:]
    work, folder = load(workload, int(train)), Path(folder)
    runner = runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
    floors, taken, covered, scores = [floor_of(work)], [], [], []
    while len(taken) < REPEATS and spent(taken) < (ENOUGH if len(taken) > 1 else SLOW):
        run, covered = runner["JOBS"][job](work, folder, layers)

        def ranked(run=run) -> None:
            scores[:] = [torch.as_tensor(run())]
            torch.topk(scores[0], 10, dim=1)

        taken.append(seconds_of(ranked))
    floors.append(floor_of(work))
    np.save(folder / "scores.npy", scores[0].double().numpy())
    told = {
        "seconds": taken,
        "floor": [min(one) for one in zip(*floors, strict=True)],
        "checkpoints": work.n_ckpt,
        "layers": covered,
    }
    print(json.dumps({**told, "version": version(runner["PACKAGE"])}))


if __name__ == "__main__":
    main()
