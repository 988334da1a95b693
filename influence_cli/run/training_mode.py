"""Forward passes as training ran them: modules in train mode, and random masks from recorded seeds.

A dropout layer draws its masks from torch's generators. With the same seed, the same micro-batch
and the same kind of device it draws the same masks again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_cli.errors import TrajectoryError, shown

Refuse = Callable[..., TrajectoryError]  # (rest of the headline, *details)
SEED_STOP = 1 << 63


class TrainingMode(NamedTuple):
    """How the forward passes of one step ran.

    `sizes`: entries of each micro-batch, in the order of the step's examples. `seeds`: the seed of
    torch's generators before the forward pass of each. `eval_modules`: names of the modules that
    were in eval mode inside the model in train mode.
    """

    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    eval_modules: tuple[str, ...] = ()

    def micro_batches(self) -> Iterator[tuple[slice, int]]:
        """The entries of each micro-batch, and its seed."""
        first = 0
        for size, seed in zip(self.sizes, self.seeds, strict=True):
            yield slice(first, first + size), seed
            first += size


@contextmanager
def run_as_trained(model: nn.Module, seed: int, eval_modules: Sequence[str]) -> Iterator[None]:
    """Put the model into train mode and seed torch's generators; afterwards restore both."""
    modes = [(module, module.training) for module in model.modules()]
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type == "cuda" else []
    try:
        model.train()
        for name in eval_modules:
            model.get_submodule(name).eval()
        with torch.random.fork_rng(devices):
            seed_generators(seed, device)
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators of the CPU and of a device. torch.manual_seed seeds those of all kinds of
    devices, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def list_eval_modules(model: nn.Module) -> list[str]:
    """The names of the outermost modules in eval mode. The model itself is in train mode."""
    if all(module.training for module in model.modules()):
        return []
    names: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not module.training and not inside:
            names.append(name)
    return names


def draws_masks(model: nn.Module) -> bool:
    """Whether a module of torch draws random masks in the mode that it has now."""
    kinds = (nn.modules.dropout._DropoutNd, nn.RReLU)
    return any(
        module.training and getattr(module, "p", 1.0) > 0
        for module in model.modules()
        if isinstance(module, kinds)
    )


def uses_batch_statistics(model: nn.Module, mode: TrainingMode) -> bool:
    """Whether a BatchNorm layer normalised with the statistics of the batch in this mode."""
    return any(normalises_batches(name, module, mode) for name, module in model.named_modules())


def normalises_batches(name: str, module: nn.Module, mode: TrainingMode) -> bool:
    """Whether a module is a BatchNorm layer in train mode."""
    is_inside = any(f"{name}.".startswith(f"{outer}.") for outer in mode.eval_modules)
    return isinstance(module, _BatchNorm) and not is_inside


# ---------------------------------------------------------------- a line of trajectory.jsonl
def read_training_mode(
    entry: dict[str, Any],  # Any: JSON values
    count: int,
    refuse: Refuse,
) -> TrainingMode | None:
    """The mode in a line with `count` examples; None where the line has no seeds.

    Raises TrajectoryError for values that do not fit.
    """
    seeds, sizes, names = entry.get("seeds"), entry.get("micro_batches"), entry.get("eval", [])
    if seeds is None:
        if sizes is not None or names:
            raise refuse("has micro_batches or eval, but no seeds", "expected: all, or none")
        return None
    if not is_list_of_numbers(seeds) or not seeds:
        raise refuse(f"seeds is {shown(seeds)}", "expected: a list with a seed per micro-batch")
    sizes = [count] if sizes is None else sizes
    if not is_list_of_numbers(sizes) or sum(sizes) != count or len(sizes) != len(seeds):
        raise refuse(
            f"micro_batches is {shown(sizes)}",
            f"expected: {len(seeds)} sizes with the sum {count}, one per seed",
        )
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise refuse(f"eval is {shown(names)}", "expected: a list of module names")
    return TrainingMode(tuple(sizes), tuple(seeds), tuple(names))


def is_list_of_numbers(value: Any) -> bool:  # Any: a JSON value
    return isinstance(value, list) and all(
        isinstance(number, int) and not isinstance(number, bool) and 0 <= number < SEED_STOP
        for number in value
    )
