"""A run with dropout that was really trained: AdamW, accumulation, clipping and a linear schedule."""

from pathlib import Path
from typing import Any

import torch

from influence_cli import TrajectoryRecorder
from tests.training import definition_of

EXAMPLES, QUERIES, STEPS = 24, 5, 12
DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(6, 18, bias=False), nn.Linear(6, 6), nn.Dropout(0.1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        p = 0.1 if self.training else 0.0
        return x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=p)))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(6)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.drop(torch.tanh(self.norm(self.attention(x)).mean(1))))

def model():
    return Net().to(torch.DTYPE)

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, 6, generator=generator, dtype=torch.float64).to(torch.DTYPE)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 24)

def query_data():
    return examples(1, 5)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def write_definition(folder: Path, dtype: str = "float32", text: str = DEFINITION) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "definition.py").write_text(text.replace("DTYPE", dtype))


def train_with_dropout(
    folder: Path,
    dtype: str = "float32",
    text: str = DEFINITION,
    seed: int | None = 7,
    micro_batches: int = 2,
    changes: dict[tuple[int, int], float] | None = None,
    record: bool = True,
    **options: Any,
) -> torch.nn.Module:
    """The trained model. `changes`: (step, example) -> factor of its weight. Without `record` the
    loop seeds each forward pass by itself, by the seeds of the run's trajectory.
    """
    import json

    write_definition(folder, dtype, text)
    space = definition_of(folder)
    torch.manual_seed(0)
    model, data = space["model"](), space["train_data"]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
    recorder = None
    if record:
        recorder = TrajectoryRecorder(
            folder, model, optimizer, checkpoint_every=4, save_optimizer=True, seed=seed, **options
        )
        recorder.__enter__()
    else:
        path = folder / "trajectory.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    order = torch.Generator().manual_seed(3)
    model.train()
    for step in range(STEPS):
        ids = torch.randperm(EXAMPLES, generator=order)[: 3 * micro_batches]
        for number, part in enumerate(ids.split(3)):
            weights = torch.full((len(part),), 1 / len(ids), dtype=data[0][0].dtype)
            if recorder is None:
                torch.manual_seed(lines[step]["seeds"][number])
                for place, example in enumerate(part.tolist()):
                    weights[place] *= (changes or {}).get((step, example), 1.0)
            batch = [torch.stack([data[i][k] for i in part.tolist()]) for k in (0, 1)]
            (space["loss"](model, batch) @ weights).backward()
            if recorder is not None:
                recorder.add(part, weights)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if recorder is not None:
            recorder.step(clip=(0.5 / (norm + 1e-6)).clamp(max=1.0))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if recorder is not None:
        recorder.__exit__(None, None, None)
    return model.eval()
