"""Compare a batch's curvature with differences of plain gradients, before any work.

Letters: B examples, D numbers of a parameter.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.curvature import Curvature, LossFunctions
from influence_cli.gradients.double_backward import no_second_derivative, twice_differentiable
from influence_cli.gradients.quantity import checked
from influence_cli.gradients.tolerances import differing

STEPS = (1e-6, 1e-8)  # lengths of the differences; the smaller one crosses fewer kinks
LIMIT = 0.02  # relative distance that rounding and kinks may cause


class PlainGradient:
    """The gradient of a batch's mean loss by plain autograd, at moved parameters."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        functions: LossFunctions,
        batch: Batch,
        weights: Tensor,
    ) -> None:
        self.model, self.names, self.functions = model, names, functions
        self.batch, self.weights = batch, weights

    def at(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """(D,) per parameter, at the values that the parameters hold."""
        with twice_differentiable(self.model, self.names):
            losses = self.functions.loss(self.model, self.batch)
            losses = checked("loss()", losses, len(self.weights))
            grads = torch.autograd.grad(
                losses @ self.weights, list(parameters.values()), allow_unused=True
            )
        return {
            name: (torch.zeros_like(value) if grad is None else grad).flatten()
            for (name, value), grad in zip(parameters.items(), grads, strict=True)
        }

    def moved(
        self, parameters: dict[str, nn.Parameter], u: dict[str, Tensor], step: float
    ) -> dict[str, Tensor]:
        """The same at parameters + step u. It puts the parameters back."""
        before = {name: value.detach().clone() for name, value in parameters.items()}
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name] + step * u[name])
        grads = self.at(parameters)
        with torch.no_grad():
            for name, value in parameters.items():
                value.copy_(before[name])
        return grads


def check_curvature(
    model: nn.Module, names: Sequence[str], functions: LossFunctions, batch: Batch, size: int
) -> None:
    """Compare the curvature of a batch of `size` with differences of gradients; for Gauss-Newton
    compare its gradient with that of loss().

    `model` and `batch` are in float64. Raises GradientError where they differ.
    """
    device = model.get_parameter(names[0]).device
    weights_B = torch.full((size,), 1 / size, dtype=torch.float64, device=device)
    curvature = Curvature(model, names, functions, batch, weights_B)
    parameters = {name: model.get_parameter(name) for name in curvature.names}
    plain = PlainGradient(model, names, functions, batch, weights_B)
    grads = plain.at(parameters)
    if differing(curvature.gradient(), grads):
        raise GradientError(
            "loss_from_outputs(outputs()) is not loss(): its gradient differs",
            "expected: the same loss in two parts, which depends on the model through the outputs "
            "only",
            "--curvature hessian needs loss() only",
        )
    generator = torch.Generator().manual_seed(0)
    u = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        for name, value in parameters.items()
    }
    _, curved = curvature.through({name: value.flatten()[None] for name, value in u.items()})
    if functions.outputs is not None:
        return
    curved_D = torch.cat([curved[name][0] for name in parameters])
    grads_D = torch.cat(list(grads.values()))
    distances = []
    for step in STEPS:
        moved_D = torch.cat(list(plain.moved(parameters, u, step).values()))
        rounding_error = 1e-9 * grads_D.norm() / step
        distance = ((moved_D - grads_D) / step - curved_D).norm()
        distances.append(float(distance / (curved_D.norm() + rounding_error)))
    if min(distances) > LIMIT:
        raise no_second_derivative(
            f"second derivatives differ from finite differences by {min(distances):.0%}"
        )
