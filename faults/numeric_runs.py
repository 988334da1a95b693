"""Small runs of known numbers, and their scores by float64 autograd, one example at a time.

The reference shares no code with the package. Letters: N train, Q query, D gradient.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

POOL, QUERIES = 17, 5  # examples of each split
STEPS, BATCH, RATE = 5, 4, 0.3  # of the training
LR = 0.125  # of --lr: a power of two, so that the integers stay exact

MODELS = {  # name -> its model, its inputs, its loss
    "mlp": (
        "nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))",
        "torch.randn(n, 4, generator=g)",
        "F.cross_entropy(model(x), y, reduction='none')",
    ),
    "convolution": (
        "nn.Sequential(nn.Conv2d(1, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 3))",
        "torch.randn(n, 1, 3, 3, generator=g)",
        "F.cross_entropy(model(x), y, reduction='none')",
    ),
    "words": (
        "nn.Sequential(nn.Embedding(9, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))",
        "torch.randint(0, 9, (n, 3), generator=g)",
        "F.cross_entropy(model(x), y, reduction='none')",
    ),
    "integers": (
        "nn.Linear(3, 1, bias=False)",
        "torch.randint(-2, 3, (n, 3), generator=g).float()",
        "model(x).flatten().square() / 2",
    ),
    "wide": (
        "nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 3))",
        "torch.randn(n, 64, generator=g)",
        "F.cross_entropy(model(x), y, reduction='none')",
    ),
}
TEMPLATE = """
import torch
from torch import nn
from torch.nn import functional as F

SCALE, ORDER, ZERO = {scale!r}, {order!r}, {zero!r}

def model():
    return {model}

def pool(seed, n, zero):
    g = torch.Generator().manual_seed(seed)
    x, y = {inputs}, torch.randint(0, 3, (n,), generator=g)
    factor = torch.tensor([0.0 if i in zero else 1.0 for i in range(n)])
    return list(zip(x, y, factor))

def train_data():
    items = pool(0, 17, ZERO["train"])
    return [items[i] for i in ORDER]

def query_data():
    return pool(1, 5, ZERO["query"])

def loss(model, batch):
    x, y, factor = batch
    return SCALE * factor * {loss}
"""
MEASURE = "\ndef measure(model, batch):\n    return -loss(model, batch)\n"
FEATURES = "\ndef features(model, batch):\n    return model[0](batch[0]) * batch[2][:, None]\n"


@dataclass(frozen=True)
class NumericRun:
    """A run. The loss is multiplied by 10^exponent, and is 0 for the examples of `zero`.

    `order`: items of the pool, which may repeat. `extra`: text at the end of the definition.
    """

    model: str = "mlp"
    exponent: int = 0
    order: tuple[int, ...] = tuple(range(POOL))
    zero: dict[str, list[int]] = field(default_factory=lambda: {"train": [], "query": []})
    extra: str = ""

    @property
    def scale(self) -> float:
        return float(f"1e{self.exponent}")

    @property
    def definition(self) -> str:
        model, inputs, loss = MODELS[self.model]
        text = TEMPLATE.format(
            scale=self.scale,
            order=self.order,
            zero=self.zero,
            model=model,
            inputs=inputs,
            loss=loss,
        )
        return text + self.extra

    def space(self) -> dict[str, Any]:  # Any: the functions of the definition
        space: dict[str, Any] = {"__name__": "definition_of_the_campaign"}
        exec(self.definition, space)
        return space


def batch_of(items: Sequence[tuple[Tensor, ...]], ids: Sequence[int]) -> list[Tensor]:
    """A batch, with floating tensors in float64."""
    columns = [torch.stack(column) for column in zip(*(items[i] for i in ids), strict=True)]
    return [column.double() if column.is_floating_point() else column for column in columns]


def draw_batches(run: NumericRun) -> list[list[int]]:
    """The examples of each step: the same items of the pool for every order."""
    generator = torch.Generator().manual_seed(2)
    steps = [torch.randperm(POOL, generator=generator)[:BATCH].tolist() for _ in range(STEPS)]
    return [[run.order.index(item) for item in step if item in run.order] or [0] for step in steps]


def build_numeric_run(run: NumericRun, folder: Path) -> Path:
    """Train in float64, and save a float32 checkpoint of each step and the trajectory."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(run.definition)
    space, batches = run.space(), draw_batches(run)
    torch.manual_seed(3)
    model, data, rate = space["model"]().double(), space["train_data"](), RATE / run.scale
    for step in range(STEPS + 1):
        if run.model == "integers":
            weight = torch.randint(-2, 3, (1, 3), generator=torch.Generator().manual_seed(step))
            model.weight.data.copy_(weight)
        saved = space["model"]()
        saved.load_state_dict(model.state_dict())
        save_model(saved, str(folder / "checkpoints" / f"step-{step:06d}.safetensors"))
        if step < STEPS:
            model.zero_grad()
            space["loss"](model, batch_of(data, batches[step])).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= rate * parameter.grad
    head = {
        "format": "influence-trajectory", "version": 1, "reduction": "mean",
        "optimizer": {"name": "sgd"},
    }  # fmt: skip
    lines = [{"step": k, "lr": rate, "examples": ids} for k, ids in enumerate(batches)]
    text = "".join(json.dumps(line) + "\n" for line in (head, *lines))
    (folder / "trajectory.jsonl").write_text(text)
    return folder


class Reference:
    """Gradients and scores of a run, in float64."""

    def __init__(self, run: NumericRun, folder: Path) -> None:
        self.run, self.folder, self.space = run, folder, run.space()
        self.data = {split: self.space[f"{split}_data"]() for split in ("train", "query")}

    def model_at(self, step: int) -> nn.Module:
        model = self.space["model"]()
        load_model(model, str(self.folder / "checkpoints" / f"step-{step:06d}.safetensors"))
        return model.double()

    def gradients(self, step: int, split: str) -> Tensor:
        """(N, D), of one example at a time."""
        model, items = self.model_at(step), self.data[split]
        rows = []
        for i in range(len(items)):
            loss = self.space["loss"](model, batch_of(items, [i])).sum()
            grads = torch.autograd.grad(loss, list(model.parameters()))
            rows.append(torch.cat([grad.flatten() for grad in grads]))
        return torch.stack(rows)

    def scores(self, method: str, normalize: bool = False) -> tuple[Tensor, Tensor]:
        """(Q, N) the scores, and the size that each score's rounding is relative to."""
        if method in ("dve", "unroll"):
            return self.reverse_scores(method)
        if method == "repsim":
            return cosines(*(self.features(split) for split in ("query", "train")))
        steps = [STEPS] if method in ("grad-dot", "grad-cos") else range(STEPS + 1)
        factor = 1.0 if len(steps) == 1 else LR
        totals = torch.zeros(2, QUERIES, len(self.run.order), dtype=torch.float64)
        for step in steps:
            query, train = (self.gradients(step, split) for split in ("query", "train"))
            if method == "tracin-we":
                size = self.space["model"]()[0].weight.numel()
                query, train = query[:, :size], train[:, :size]
            if normalize or method == "grad-cos":
                pair = cosines(query, train)
            else:
                pair = query @ train.T, query.norm(dim=1)[:, None] * train.norm(dim=1)
            totals += factor * torch.stack(pair)
        return totals[0], totals[1]

    def self_scores(self) -> tuple[Tensor, Tensor]:
        """(1, N)."""
        squares = [self.gradients(k, "train").square().sum(1) for k in range(STEPS + 1)]
        total = LR * torch.stack(squares).sum(0)[None]
        return total, total

    def features(self, split: str) -> Tensor:
        """(N, F): features of the definition, or the input of the last layer."""
        model, items = self.model_at(STEPS), self.data[split]
        batch = batch_of(items, range(len(items)))
        if "features" in self.space:
            return self.space["features"](model, batch).detach()
        inputs = []
        hook = list(model.modules())[-1].register_forward_hook(
            lambda module, args, output: inputs.append(args[0].detach())
        )
        self.space["loss"](model, batch)
        hook.remove()
        return inputs[0]

    def reverse_scores(self, method: str) -> tuple[Tensor, Tensor]:
        """dve: w rate g(z) . a, a <- a - rate H a, with H = sum w g g^T; unroll: with the Hessian.

        a is the query's gradient at the end.
        """
        batches, rate = draw_batches(self.run), RATE / self.run.scale
        adjoint = self.gradients(STEPS, "query")
        totals = torch.zeros(2, QUERIES, len(self.run.order), dtype=torch.float64)
        for step in reversed(range(STEPS)):
            ids = batches[step]
            grads = self.gradients(step, "train")[ids]
            products = adjoint @ grads.T
            sizes = adjoint.norm(dim=1)[:, None] * grads.norm(dim=1)
            for column, example in enumerate(ids):
                totals[0, :, example] += rate / len(ids) * products[:, column]
                totals[1, :, example] += rate / len(ids) * sizes[:, column]
            if method == "dve":
                adjoint = adjoint - rate / len(ids) * products @ grads
            else:
                adjoint = adjoint - rate * self.curve(step, ids, adjoint)
        return totals[0], totals[1]

    def curve(self, step: int, ids: Sequence[int], vectors: Tensor) -> Tensor:
        """(Q, D): the Hessian of a step's loss times each vector, by two backward passes."""
        model = self.model_at(step)
        parameters = list(model.parameters())
        loss = self.space["loss"](model, batch_of(self.data["train"], ids)).mean()
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([grad.flatten() for grad in grads])
        rows = []
        for vector in vectors:
            product = torch.autograd.grad((flat * vector).sum(), parameters, retain_graph=True)
            rows.append(torch.cat([value.flatten() for value in product]))
        return torch.stack(rows)


def cosines(query: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, N) cosines, 0 where one of the two is 0; and ones."""
    units = [
        rows / rows.norm(dim=1, keepdim=True).where(rows.any(1, keepdim=True), 1)
        for rows in (query, train)
    ]
    return units[0] @ units[1].T, torch.ones(len(query), len(train), dtype=torch.float64)
