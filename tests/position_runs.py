"""Runs over positions, and the slow reference of the split of scores over them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GPT = """
import torch
from torch import nn
from torch.nn import functional as F

WORDS = ["<pad>", *"abcdefg"]

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, h):
        q, k, v = self.qkv(self.norm(h)).split(6, 2)
        return h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))

class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.places, self.block = nn.Embedding(8, 6), nn.Embedding(7, 6), Block()
        self.scale, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 8, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids):
        h = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head(self.block(h) * self.scale)

def model():
    return GPT()

class Texts(torch.utils.data.Dataset):
    def __init__(self, seed, number):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 6, (number,), generator=generator).tolist()
        self.rows = [torch.randint(1, 8, (length,), generator=generator) for length in lengths]
        self.rows[0] = torch.tensor([2, 5, 2, 2, 5])  # tokens come again

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]

def train_data():
    return Texts(0, 9)

def query_data():
    return Texts(1, 3)

def collate(items):
    return {"input_ids": nn.utils.rnn.pad_sequence([*items, torch.zeros(6, dtype=torch.int64)], True)[:-1]}

def token_losses(model, batch):
    ids = batch["input_ids"]
    losses = F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none", ignore_index=0)
    return F.pad(losses, (1, 0))

def loss(model, batch):
    return token_losses(model, batch).sum(1)

def measure_tokens(model, batch):
    return -token_losses(model, batch)

def token(id):
    return WORDS[id]
"""


@contextmanager
def copied_weights(model: nn.Module, length: int, copies: dict[str, Tensor]) -> Iterator[None]:
    """Each layer uses one copy of its weights per position: `copies`, filled by name (S, *shape)."""
    plain = {name: getattr(F, name) for name in ("linear", "embedding", "layer_norm")}
    names = {id(value): name for name, value in model.named_parameters()}

    def copy_of(value: Tensor) -> Tensor:
        name = names[id(value)]
        if name not in copies:
            copies[name] = value.detach().expand(length, *value.shape).clone().requires_grad_()
        return copies[name]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = torch.einsum("bsi,soi->bso", x, copy_of(weight))
        return y if bias is None else y + copy_of(bias)

    def embedding(ids: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        rows = torch.stack([copy_of(weight)[s][ids[..., s]] for s in range(length)], -2)
        return rows

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return plain["layer_norm"](x, shape, None, None, eps) * copy_of(weight) + copy_of(bias)

    F.linear, F.embedding, F.layer_norm = linear, embedding, layer_norm  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(F, name, function)
