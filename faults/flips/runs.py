"""The runs whose stored files are flipped."""

from pathlib import Path

import torch

from faults.forks import DEFINITION, build_run
from influence_cli import TrajectoryRecorder

STEPS, EVERY, BATCH = 12, 4, 4
WORDS = """
import torch
from torch import nn
from torch.nn import functional as F

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(14, 6, padding_idx=0), nn.Linear(6, 3)

    def forward(self, ids):
        return self.out(torch.tanh(self.words(ids)).mean(1))

def model():
    return Reader()

def texts(seed, number):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 14, (number, 5), generator=generator)
    return torch.utils.data.TensorDataset(ids, torch.arange(number) % 3)

def train_data():
    return texts(0, 40)

def query_data():
    return texts(1, 6)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def build_plain(place: Path) -> None:
    """Checkpoints that `save_model` wrote."""
    build_run(place / "run")


def build_larger(place: Path) -> None:
    """Enough examples for two shards."""
    build_run(place / "run", definition=DEFINITION.replace("examples(0, 40)", "examples(0, 160)"))


def build_words(place: Path) -> None:
    """A model with word embeddings."""
    build_run(place / "run", definition=WORDS)


def build_recorded(place: Path, adam: bool = False) -> None:
    """A recorded training of a few steps, with its checkpoints and optimizer states."""
    run, space = place / "run", {"__name__": "definition_of_the_campaign"}
    run.mkdir(parents=True)
    (run / "definition.py").write_text(DEFINITION)
    exec(DEFINITION, space)
    torch.manual_seed(0)
    model, examples, loss = space["model"](), space["train_data"](), space["loss"]  # type: ignore[operator]
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), 0.01)
        if adam
        else torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    )
    with TrajectoryRecorder(
        run, model, optimizer, checkpoint_every=EVERY, save_optimizer=True
    ) as recorder:
        for step in range(STEPS):
            indices = torch.randperm(len(examples))[:BATCH]
            optimizer.zero_grad()
            loss(model, examples[indices]).mean().backward()  # type: ignore[operator]
            recorder.step(indices, seed=step)
            optimizer.step()


def build_adam(place: Path) -> None:
    """A recorded training with Adam whose replay must begin at a saved optimizer state."""
    build_recorded(place, adam=True)
    (place / "run/checkpoints/step-000000.safetensors").unlink()
