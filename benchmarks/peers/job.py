"""One job of one runner in one environment: python -P benchmarks/peers/job.py RUNNER JOB WORKLOAD N_TRAIN FOLDER CLOCK [LAYERS...]

Measures the floor and runs the job, in turns, up to five times within 5 seconds; saves the scores (Q, N) as FOLDER/scores.npy and prints
one JSON line: the least seconds of each, the package's version, and the layers that count (none: all parameters). CLOCK is wall, or
processor: one thread, and its processor seconds.

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
REPEATS, ENOUGH = 5, 5.0
ROUND = 0.1


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


def floor_of(work: Work, now: Callable[[], float]) -> float:
    """Seconds of one forward+backward over the training set: the least at any batch size, in two seconds of rounds.

    A round repeats until ROUND seconds have passed: some systems count processor time in ticks of 10 ms.
    """
    best, batches = float("inf"), FLOOR_BATCHES[work.name]
    for batch in batches:
        begin = now()
        while now() - begin < 2 / len(batches):
            start, repeats = now(), 0
            while (elapsed := now() - start) < ROUND:
                floor_seconds(work, batch, 1)
                repeats += 1
            best = min(best, elapsed / repeats)
    return best


def main() -> None:
    name, job, workload, train, folder, clock, *layers = sys.argv[1:]
    now = time.perf_counter
    if clock == "processor":
        now = time.process_time
        torch.set_num_threads(1)
    work, folder = load(workload, int(train)), Path(folder)
    runner = runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
    floor, taken, scores_QN = float("inf"), [], torch.empty(0)
    while sum(taken) < ENOUGH and (len(taken) < REPEATS or sum(taken) < ROUND):
        floor = min(floor, floor_of(work, now))
        run, covered = runner["JOBS"][job](work, folder, layers)
        started = now()
        scores_QN = torch.as_tensor(run())
        torch.topk(scores_QN, 10, dim=1)
        taken.append(now() - started)
    np.save(folder / "scores.npy", scores_QN.double().numpy())
    told = {
        "seconds": min(taken) or sum(taken) / len(taken),
        "floor": min(floor, floor_of(work, now)),
        "checkpoints": work.n_ckpt,
        "layers": covered,
    }
    print(json.dumps({**told, "version": version(runner["PACKAGE"])}))


if __name__ == "__main__":
    main()
