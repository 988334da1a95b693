"""A small GPT with dropout on windows of 33 letters."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
WINDOW, QUERIES = 33, 40


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width, bias=False)
        self.project, self.drop = nn.Linear(width, width), nn.Dropout(0.1)
        self.hidden, self.output = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        B, S, W = x.shape
        q, k, v = (
            part.view(B, S, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.norm(x)).chunk(3, -1)
        )
        dropout = 0.1 if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.project(mixed.transpose(1, 2).reshape(B, S, W)))
        return x + self.drop(self.output(F.gelu(self.hidden(self.norm_hidden(x)))))


class Gpt(nn.Module):
    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.letters, self.positions = nn.Embedding(128, width), nn.Embedding(WINDOW, width)
        self.drop, self.norm = nn.Dropout(0.1), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(layers))
        self.head = nn.Linear(width, 128)

    def forward(self, letters):
        positions = torch.arange(letters.shape[1], device=letters.device)
        x = self.drop(self.letters(letters) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def model():
    return Gpt()


def windows():
    return torch.from_numpy(np.load(HERE / "letters.npy").reshape(-1, WINDOW).astype(np.int64))


def train_data():
    return windows()[:-QUERIES]


def query_data():
    return windows()[-QUERIES:]


def loss(model, batch):
    logits = model(batch[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), batch[:, 1:], reduction="none")
    return losses.mean(1)


def describe(example):
    return bytes(example.tolist()).decode()
