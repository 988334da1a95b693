"""Runs that were really trained, in float64, by torch's own SGD; with their trajectory."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from influence_cli.run.optimizer_state import save_state
from influence_cli.storage.safetensors_io import write_tensors
from tests import reference

Tilt = tuple[int, int, float]
DEFINITION = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(number, 4, generator=generator, dtype=torch.float64)
    return torch.utils.data.TensorDataset(x, torch.randint(0, 3, (number,), generator=generator))

def train_data():
    return examples(0, 24)

def query_data():
    return examples(1, 5)

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def label(example):
    return "abc"[int(example[1])]
"""


def definition_of(folder: Path) -> dict[str, Any]:
    space: dict[str, Any] = {
        "__file__": str(folder / "definition.py"),
        "__name__": "definition_of_a_test",
    }
    exec(compile((folder / "definition.py").read_text(), "definition.py", "exec"), space)
    return space


def train(
    folder: Path,
    steps: int = 12,
    every: int = 1,
    batch: int = 4,
    rate: float = 0.3,
    options: dict[str, Any] | None = None,
    groups: Sequence[dict[str, Any]] = (),
    reduction: str = "mean",
    weights: bool = False,
    clip: Callable[[float], float] = lambda norm: 1.0,
    batches: Callable[[int], list[int]] | None = None,
    definition: str = DEFINITION,
    kind: type[torch.optim.Optimizer] = torch.optim.SGD,
    tilt: Tilt | None = None,
    states: bool = False,
) -> Path:
    """A run folder. `tilt`: (step, example, by): the example's weight in that step is so much larger.

    `groups`: header groups (`params`, `lr` as a factor on the rate, options); `clip`: factor from the gradient's norm."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "definition.py").write_text(definition)
    space = definition_of(folder)
    torch.manual_seed(0)
    model, data = space["model"](), space["train_data"]()
    parameters = dict(model.named_parameters())
    factors = [group.get("lr", 1.0) for group in groups] or [1.0]
    members = [[parameters[name] for name in group["params"]] for group in groups] or [
        list(parameters.values())
    ]
    own = [
        {key: value for key, value in group.items() if key not in ("lr", "params")}
        for group in groups
    ] or [{}]
    optimizer = kind(
        [{"params": m, **o} for m, o in zip(members, own, strict=True)], lr=rate, **(options or {})
    )  # type: ignore[call-arg]
    named = {"name": kind.__name__.lower(), **(options or {})}
    head: dict[str, Any] = {"format": "influence-trajectory", "version": 1, "optimizer": named}
    head |= {} if weights else {"reduction": reduction}
    head |= (
        {"groups": [{"params": list(g["params"]), **o} for g, o in zip(groups, own, strict=True)]}
        if groups
        else {}
    )
    lines, order = [head], torch.Generator().manual_seed(1)
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            save_file(state, str(folder / "checkpoints" / f"step-{step:06d}.safetensors"))
            if states:
                save_state(folder / "optimizer" / f"step-{step:06d}.safetensors", model, optimizer)
        if step == steps:
            break
        ids = (
            batches(step)
            if batches
            else torch.randperm(len(data), generator=order)[:batch].tolist()
        )
        w = torch.full(
            (len(ids),), 1 / len(ids) if reduction == "mean" else 1.0, dtype=torch.float64
        )
        if weights:
            w = torch.rand(len(ids), generator=order, dtype=torch.float64) / len(ids)
        if tilt is not None and tilt[0] == step:
            w[[position for position, example in enumerate(ids) if example == tilt[1]]] += tilt[2]
        rates = [rate * factor / (1 + step / 10) for factor in factors]
        optimizer.zero_grad()
        (
            w * space["loss"](model, torch.utils.data.default_collate([data[i] for i in ids]))
        ).sum().backward()
        norm = float(
            torch.stack([p.grad.norm() for p in parameters.values() if p.grad is not None]).norm()
        )
        line: dict[str, Any] = {"step": step, "lr": rates if groups else rates[0], "examples": ids}
        line |= {"weights": w.tolist()} if weights else {}
        if (factor := clip(norm)) != 1:
            line["clip"] = factor
            for parameter in parameters.values():
                parameter.grad *= factor
        lines.append(line)
        for group, value in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = value
        optimizer.step()
    (folder / "trajectory.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def expected(
    folder: Path,
    steps: Sequence[int] | None = None,
    end: int | None = None,
    names: Sequence[str] | None = None,
    sources: Sequence[str] | None = None,
    **options: Any,
) -> list[tuple[int, list[int], torch.Tensor]]:
    """Per step its number, its examples and their scores (B, Q), by `reference.left_out` on autograd's gradients, one example at a time.

    `steps`: the checkpoints that are used, the last of them the end; `names`: the selected parameters; `sources`: those whose part counts.
    """
    space = definition_of(folder)
    model, data, queries = space["model"](), space["train_data"](), space["query_data"]()
    head, *lines = [
        json.loads(text) for text in (folder / "trajectory.jsonl").read_text().splitlines()
    ]
    latest = {line["step"]: line for line in lines}
    there = sorted(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").iterdir())
    used = (
        list(steps) if steps is not None else [step for step in there if end is None or step <= end]
    )
    one = lambda source, i: torch.utils.data.default_collate([source[i]])  # noqa: E731

    def gradients(step: int, source: Any, ids: Sequence[int]) -> torch.Tensor:
        load(model, folder, step)
        found = reference.gradients(model, space["loss"], [one(source, i) for i in ids])
        return reference.flat(found, names)

    selected = [name for name, _ in model.named_parameters() if names is None or name in names]
    sizes = {name: dict(model.named_parameters())[name].numel() for name in selected}
    kept = torch.cat(
        [
            torch.full((sizes[n],), float(sources is None or n in sources), dtype=torch.float64)
            for n in selected
        ]
    )
    passed = []
    for step in range(used[-1]):
        line = latest[step]
        checkpoint = max([c for c in used[:-1] if c <= step], default=used[0])
        G = gradients(checkpoint, data, line["examples"])
        count = len(line["examples"])
        w = torch.tensor(
            line.get("weights", [1 / count if head.get("reduction") == "mean" else 1.0] * count),
            dtype=torch.float64,
        )
        rate = line["lr"]
        if isinstance(rate, list):
            of = {
                name: value
                for group, value in zip(head["groups"], rate, strict=True)
                for name in group["params"]
            }
            rate = torch.cat(
                [torch.full((sizes[n],), of[n], dtype=torch.float64) for n in selected]
            )
        passed.append((G, w, rate, line.get("clip", 1.0)))
    query = gradients(used[-1], queries, range(len(queries)))
    whole = reference.left_out(
        [(G, G, w, rate, s) for G, w, rate, s in passed], query, source=kept, **options
    )
    return [(step, latest[step]["examples"], scores) for step, scores in enumerate(whole)]


def summed(found: Sequence[tuple[int, list[int], torch.Tensor]], count: int) -> torch.Tensor:
    """(Q, N): each example's scores over its steps."""
    total = torch.zeros(found[0][2].shape[1], count, dtype=torch.float64)
    for _, examples, scores in found:
        for example, row in zip(examples, scores, strict=True):
            total[:, example] += row
    return total


def load(model: nn.Module, folder: Path, step: int) -> None:
    model.load_state_dict(load_file(str(folder / "checkpoints" / f"step-{step:06d}.safetensors")))


def change_state(run: Path, step: int) -> None:
    """Save an optimizer state again, with first moments that are a percent larger."""
    path = run / "optimizer" / f"step-{step:06d}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = {key: file.metadata()[key] for key in ("optimizer", "numbers")}
    scale = {"exp_avg": 1.01}
    tensors = {
        name: value * scale.get(name.partition("/")[0], 1)
        for name, value in load_file(path).items()
    }
    write_tensors(path, tensors, metadata)
