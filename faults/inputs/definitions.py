"""What a definition's functions return: losses, labels, texts, items, batches."""

import math
import random
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from faults.inputs.target import Target, expect
from faults.mutate import random_text
from influence_cli.extraction.extractor import check_finite
from influence_cli.gradients.quantity import checked
from influence_cli.run.datasets import Examples, digest_item
from influence_cli.run.definition import Definition

SIZE = 4  # examples of a batch
NUMBERS = (0.0, 1.0, -1.0, 1e-320, 1e300, math.nan, math.inf, -math.inf)


class Unprintable:
    """Raises when it is printed."""

    def __repr__(self) -> str:
        raise RuntimeError("no text")


# ---------------------------------------------------------------- losses
def make_losses(rng: random.Random) -> Any:  # Any: what a user's function may return
    shape = rng.choice(((), (4,), (4,), (4,), (3,), (4, 1), (0,), (1, 4), (5,)))
    dtype = rng.choice((
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool,
        torch.complex64, torch.float8_e4m3fn,
    ))  # fmt: skip
    numbers = [rng.choice((0.0, 1.0, rng.choice(NUMBERS))) for _ in range(math.prod(shape))]
    tensor = torch.tensor(numbers, dtype=torch.float64).view(shape).to(dtype)
    if dtype.is_floating_point and rng.random() < 0.8:
        tensor.requires_grad_()
    others = (None, 1.0, [tensor], (tensor,), "x", np.zeros(4), {}, Unprintable())
    return rng.choice(others) if rng.random() < 0.2 else tensor


def parse_losses(losses: Any) -> None:  # Any: see make_losses
    value = checked("loss", losses, SIZE)
    expect(tuple(value.shape) == (SIZE,) and value.is_floating_point(), "a wrong shape or dtype")
    expect(value.requires_grad, "not differentiable")
    squares = {"weight": torch.ones(SIZE)}
    check_finite("checkpoint", "train", np.arange(SIZE), value.detach().double(), squares)
    expect(all(map(math.isfinite, value.tolist())), "a loss that is not finite")


# ---------------------------------------------------------------- labels and items
def make_value(rng: random.Random) -> Any:  # Any: what label() or a data set may return
    return rng.choice((
        lambda: random_text(rng), lambda: rng.choice(NUMBERS), lambda: rng.randrange(-9, 9),
        lambda: 10**5000, lambda: None, lambda: b"\xff", lambda: torch.tensor(rng.random()),
        lambda: torch.zeros(2, 2), lambda: np.float32(1), lambda: np.array(["a", "b"]),
        lambda: np.array([None, 1], dtype=object), lambda: [make_value(rng)],
        lambda: {random_text(rng): make_value(rng)}, Unprintable, lambda: torch.tensor([], dtype=torch.bfloat16),
        lambda: torch.zeros(3).to_sparse(), lambda: frozenset({1}), lambda: 1j, lambda: True,
    ))()  # fmt: skip


def parse_value(value: Any) -> None:  # Any: see make_value
    """As a label, as a text, and as an example of a data set: read twice, it is the same."""
    module = ModuleType("definition")
    vars(module).update(
        train_data=lambda: [value], label=lambda example: example, describe=lambda example: example
    )
    examples = Examples(Definition(Path("definition.py"), "digest", module), "train")
    label = examples.label(0)
    expect(isinstance(label, str) and examples.text(0) == label, "a label that is no text")
    if isinstance(value, str):
        expect(label == value, "another label")
    expect(examples.digest(0) == digest_item(value), "another digest")
    examples.check_stable([0])


def parse_batch(value: Any) -> None:  # Any: see make_value
    """As items that torch's default collate puts together."""
    module = ModuleType("definition")
    vars(module).update(train_data=lambda: [value, value])
    Examples(Definition(Path("definition.py"), "digest", module), "train").batch([0, 1])


def make_targets(folder: Path) -> list[Target]:
    return [
        Target("losses of a definition", make_losses, parse_losses, 40),
        Target("labels, texts and items", make_value, parse_value, 15),
        Target("items in a batch", make_value, parse_batch, 15),
    ]
