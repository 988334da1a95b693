"""The statistics of a batch that BatchNorm layers put into their running statistics.

Letters: C channels of a layer, K directions.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from influence_cli.errors import GradientError, listed
from influence_cli.gradients.double_backward import vector_jacobian_products

# layer -> (2 C,) mean and unbiased variance of each of its calls, with their graphs
CallStatistics = dict[str, list[Tensor]]


def is_running(module: nn.Module) -> bool:
    """Whether a forward pass in train mode changes running statistics by a fixed momentum."""
    return (
        isinstance(module, _BatchNorm)
        and module.running_mean is not None
        and module.momentum is not None
    )


@contextmanager
def collect_statistics(model: nn.Module) -> Iterator[CallStatistics]:
    """Collects the statistics of all forward passes inside, of layers in train mode."""
    calls: CallStatistics = {}
    handles = []

    def hook_of(name: str) -> Any:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if module.training:
                x = inputs[0]
                rest = [axis for axis in range(x.dim()) if axis != 1]
                statistics = torch.cat([x.mean(rest), x.var(rest, correction=1)])
                calls.setdefault(name, []).append(statistics)

        return collect

    for name, module in model.named_modules():
        if is_running(module):
            handles.append(module.register_forward_pre_hook(hook_of(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def pull_statistics(
    calls: CallStatistics, vectors: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]
) -> list[Tensor]:
    """(K, *shape) per parameter: the derivative of the sum over layers of statistics x vectors.
    `vectors`: (K, 2 C) by layer.

    Raises GradientError for a layer that ran several times.
    """
    if repeated := [name for name in vectors if len(calls.get(name, [])) > 1]:
        raise GradientError(
            f"a BatchNorm layer runs several times in a forward pass: {listed(repeated)}",
            "expected: once; its running statistics then have one derivative per step",
            "--layers '!NAME' leaves its parameters out",
        )
    pairs = [(calls[name][0], vector) for name, vector in vectors.items() if name in calls]
    directions = [vector.to(statistics.dtype) for statistics, vector in pairs]
    return vector_jacobian_products([one for one, _ in pairs], list(parameters), directions)
