"""BatchNorm's running statistics in a reverse pass.

In train mode each forward pass changes them: s' = (1 - m) s + m stat(theta), with the layer's
momentum m and the batch's mean and variance. The queries run in eval mode, with the last s. So the
reverse pass carries a_s, the derivative of a query's loss by s, beside a_theta:

    a_theta += m a_s . d stat / d theta,   a_s <- (1 - m) a_s

At the end of training a_s follows from the gradients of the layer's own weight and bias, since the
layer computes (x - mean) / sqrt(var + eps) * weight + bias.

Letters: K quantities of the final model, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.batch_statistics import is_running
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.run.training_mode import normalises_batches


@dataclass(frozen=True)
class RunningStatistics:
    """The layers whose running statistics a query depends on. `momenta`: by layer."""

    momenta: dict[str, float]

    def at_the_end(
        self, source: GradientSource, gradients: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """(K, 2 C) a_s by layer. `gradients`: (K, D) of the queries. The model holds the end."""
        adjoints = {}
        for name in self.momenta:
            layer: Any = source.run.model.module.get_submodule(name)  # a BatchNorm layer
            by_weight, by_bias = (gradients[f"{name}.{part}"] for part in ("weight", "bias"))
            weight, var = (
                value.detach().to(by_bias.device, by_bias.dtype)
                for value in (layer.weight, layer.running_var)
            )
            scale = (var + layer.eps).rsqrt()
            by_mean = -weight * scale * by_bias
            by_var = -0.5 * weight * scale.square() * by_weight
            adjoints[name] = torch.cat([by_mean, by_var], dim=1)
        return adjoints

    def call_vectors(self, a_s: Mapping[str, Tensor], calls: int) -> dict[str, list[Tensor]]:
        """m (1 - m)^(later calls) a_s for each of the calls of a step, in order."""
        return {
            name: [
                momentum * (1 - momentum) ** (calls - 1 - call) * a_s[name] for call in range(calls)
            ]
            for name, momentum in self.momenta.items()
        }

    def move_back(self, a_s: Mapping[str, Tensor], calls: int) -> None:
        """From after a step of so many forward passes to before it."""
        for name, momentum in self.momenta.items():
            a_s[name].mul_((1 - momentum) ** calls)


NO_STATISTICS = RunningStatistics({})


def find_running_statistics(
    source: GradientSource, plan: ReversePlan
) -> tuple[RunningStatistics, list[str]]:
    """The statistics that a reverse pass carries, and the layers whose statistics it can't carry:
    weight or bias are not among the plan's parameters, or the momentum is not fixed.
    """
    modes = [line.training for line in plan.trajectory.lines if line.training is not None]
    momenta, others = {}, []
    for name, module in source.run.model.module.named_modules():
        if not modes or not normalises_batches(name, module, modes[0]):
            continue
        is_trained = all(f"{name}.{part}" in plan.columns for part in ("weight", "bias"))
        if is_running(module) and is_trained:
            momenta[name] = float(module.momentum)
        elif module.running_mean is not None:
            others.append(name)
    return RunningStatistics(momenta), others
