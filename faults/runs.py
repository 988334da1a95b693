"""The folder that trials start from: small runs, and the shards of a table.

run/      a classifier with three checkpoints of random weights
trained/  a classifier that was trained and recorded, with the state of its optimizer
texts/    a classifier of token ids
parts/    two shards of one table
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from faults.forks import DEFINITION, build_run, run_command
from influence_cli import TrajectoryRecorder
from influence_cli.extraction import memory_budget
from influence_cli.methods.reverse import embedding_build, occurrences, resume

TEXTS = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Embedding(12, 4), nn.Flatten(), nn.Linear(24, 3))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 12, (number, 6), generator=generator)
    return torch.utils.data.TensorDataset(ids, torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 40)

def query_data():
    return examples(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def token(number):
    return "abcdefghijkl"[number]
"""
# shards begin at multiples of 64
TWO_SHARDS = DEFINITION.replace("examples(0, 40)", "examples(0, 80)")
STEPS, BATCH, CHECKPOINT_EVERY = 12, 8, 4


def write_small_pieces() -> None:
    """Makes this process write many small files, and save its progress after each step."""
    memory_budget.UNIT_EXAMPLES = 16
    resume.SAVE_SECONDS = 0.0
    embedding_build.ROWS_BYTES = 4096
    occurrences.MEMORY_BYTES = 0


def call_in_fork(work: Callable[[], None]) -> None:
    """Autograd may start threads, which a process that forks must not have."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if status:
        raise RuntimeError(f"{work} failed")


def train_run(folder: Path) -> None:
    """Trains and records; resumes a training that was killed, as the documentation says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "definition.py").write_text(DEFINITION)
    space: dict = {"__name__": "definition_of_the_campaign"}
    exec(DEFINITION, space)
    torch.manual_seed(0)
    model, data = space["model"](), space["train_data"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    order = torch.Generator().manual_seed(1)
    batches = [torch.randperm(len(data), generator=order)[:BATCH].tolist() for _ in range(STEPS)]
    start = TrajectoryRecorder.restore(folder, model, optimizer)
    with TrajectoryRecorder(
        folder, model, optimizer, CHECKPOINT_EVERY, start=start, save_optimizer=True
    ) as recorder:
        for ids in batches[start:]:
            batch = torch.utils.data.default_collate([data[i] for i in ids])
            optimizer.zero_grad()
            space["loss"](model, batch).mean().backward()
            recorder.step(ids)
            optimizer.step()


def build_template(folder: Path) -> Path:
    build_run(folder / "run", definition=TWO_SHARDS)
    build_run(folder / "texts", definition=TEXTS)
    call_in_fork(lambda: train_run(folder / "trained"))
    parts = folder / "parts"
    parts.mkdir()
    for shard in (1, 2):
        arguments = ("score", "run", "--shard", f"{shard}/2", "--cache", "none", "--top", "all")
        ended = run_command((*arguments, "-o", f"parts/{shard}.csv"), folder)
        if ended.code:
            raise RuntimeError(f"a shard fails: {ended.err}")
    for path in folder.glob("???-0"):  # what the shards printed
        path.unlink()
    return folder
