"""Runs over positions, and the slow reference of the split of scores over them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model
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


READER = """
import torch
from torch import nn
from torch.nn import functional as F

class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.norm, self.out = nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2)
        self.place = nn.Parameter(torch.randn(4, 5))

    def forward(self, x):
        return self.out(torch.tanh(self.norm(self.mix(x)) * self.place).mean(1))

def model():
    return Reader()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.TensorDataset(torch.randn(number, 4, 3, generator=generator), torch.arange(number) % 2)

def train_data():
    return examples(0, 8)

def query_data():
    return examples(1, 3)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def load_definition(run: Path) -> dict[str, Any]:
    space: dict[str, Any] = {"__file__": str(run / "definition.py"), "__name__": "definition_here"}
    exec(compile((run / "definition.py").read_text(), "definition.py", "exec"), space)
    return space


def models(run: Path, space: dict[str, Any]) -> Iterator[tuple[nn.Module, float]]:
    """Each checkpoint in float64, with its learning rate (tests/conftest.py)."""
    for k, path in enumerate(sorted((run / "checkpoints").glob("*"))):
        model = space["model"]()
        load_model(model, str(path))
        yield model.double().eval(), 0.1 / (1 + k)


def single(space: dict[str, Any], data: Any, i: int) -> Any:
    collate = space.get("collate", torch.utils.data.default_collate)
    batch = collate([data[i]])
    tensors = batch if isinstance(batch, list | tuple) else None
    return (
        batch if tensors is None else [t.double() if t.is_floating_point() else t for t in tensors]
    )


def gradients_by_position(
    model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batch: Any, length: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By autograd in a model in which each position has a copy of the weights: the gradients
    (S, *shape) of the copies, and those of weights that are used without positions.
    """
    names = {id(value): name for name, value in model.named_parameters()}
    copies: dict[str, Tensor] = {}

    def copy_of(value: Tensor) -> Tensor:
        name = names[id(value)]
        if name not in copies:
            copies[name] = value.detach().expand(length, *value.shape).clone().requires_grad_()
        return copies[name]

    plain = F.linear, F.embedding, F.layer_norm, torch.addmm

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.ndim < 3:
            return plain[0](x, weight, bias)
        y = torch.einsum("bsi,soi->bso", x, copy_of(weight))
        return y if bias is None else y + copy_of(bias)

    def embedding(ids: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
        return torch.stack([copy_of(weight)[s][ids[..., s]] for s in range(length)], -2)

    def layer_norm(x: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return plain[2](x, shape, None, None, eps) * copy_of(weight) + copy_of(bias)

    def addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.einsum("si,sio->so", x, copy_of(weight)) + copy_of(bias)

    for name in ("scale", "place"):  # bare parameters: of all positions, and of one
        if isinstance(value := getattr(model, name, None), nn.Parameter):
            copies[name] = value.detach().expand(length, *value.shape).clone().requires_grad_()
            delattr(model, name)
            diagonal = (
                torch.stack([copies[name][s][s] for s in range(length)])
                if value.ndim > 1
                else copies[name]
            )
            setattr(model, name, diagonal)
    F.linear, F.embedding, F.layer_norm = linear, embedding, layer_norm  # type: ignore[assignment]
    torch.addmm = addmm  # type: ignore[assignment]
    try:
        losses = loss(model, batch)
    finally:
        F.linear, F.embedding, F.layer_norm, torch.addmm = plain
    rest = {name: value for name, value in model.named_parameters() if name not in copies}
    targets = [*copies.values(), *rest.values()]
    grads = torch.autograd.grad(losses.sum(), targets, allow_unused=True)
    values = {
        name: torch.zeros_like(target) if grad is None else grad
        for (name, target), grad in zip([*copies.items(), *rest.items()], grads, strict=True)
    }
    return {name: values[name] for name in copies}, {name: values[name] for name in rest}
