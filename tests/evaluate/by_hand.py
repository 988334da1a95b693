"""A recorded training on some of its examples, written out with autograd alone."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.training import definition_of, load


def train_by_hand(
    run: Path, members_N: np.ndarray, renormalize: bool = False, momentum: float = 0.0
) -> np.ndarray:
    """The loss of each query after the recorded steps on these examples."""
    space = definition_of(run)
    data, queries = space["train_data"](), space["query_data"]().tensors
    model = space["model"]()
    load(model, run, 0)
    velocity = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for line in map(json.loads, (run / "trajectory.jsonl").read_text().splitlines()[1:]):
        rest = [i for i in line["examples"] if members_N[i]]
        gradients = tuple(torch.zeros_like(parameter) for parameter in model.parameters())
        if rest:
            losses = space["loss"](model, [tensor[rest] for tensor in data.tensors])
            count = len(rest) if renormalize else len(line["examples"])
            gradients = torch.autograd.grad(losses.sum() / count, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient, v in zip(model.parameters(), gradients, velocity, strict=True):
                v.mul_(momentum).add_(gradient)
                parameter -= line["lr"] * v
    return space["loss"](model, queries).detach().numpy()
