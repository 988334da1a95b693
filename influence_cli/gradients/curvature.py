"""The exact curvature of one batch at the parameters that the model holds.

For a direction u it gives the products g(z).u of every example z, and H u. It forms no gradient of
a single example.

Let L(v) = sum over z of v_z loss(z), and G = dL(w)/dtheta with its own graph. Then
H u = d(G.u)/dtheta (Pearlmutter 1994, "Fast exact multiplication by the Hessian") and
g(z).u = d(G.u)/dv_z. One backward pass through the backward pass gives both. All directions share
the forward pass and its backward pass. Forward mode would take more passes and work for fewer
layers (docs/log.md).

Letters: B examples, K directions, D numbers of a parameter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError, is_out_of_memory
from influence_cli.gradients.batch_statistics import collect_statistics, pull_statistics
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.double_backward import (
    PlainWeightNorm,
    differentiable_gradients,
    explained,
    no_second_derivative,
    twice_differentiable,
    vector_jacobian_products,
)
from influence_cli.gradients.quantity import checked
from influence_cli.gradients.tolerances import rounding

Directions = dict[str, Tensor]  # per parameter (K, D)


@dataclass(frozen=True)
class LossFunctions:
    """The definition's functions of a batch. With `outputs` and `loss_from_outputs` the curvature
    is that of Gauss-Newton, J^T S J: the curvature S of the loss in the outputs, without that of
    the outputs in the parameters.
    """

    loss: Callable[[nn.Module, Batch], Tensor]
    outputs: Callable[[nn.Module, Batch], Tensor] | None = None
    loss_from_outputs: Callable[[Tensor, Batch], Tensor] | None = None


class Curvature:
    """The curvature of one batch, whose examples have the weights `weights` (B,).

    `at_once`: directions that one pass computes, by vmap. Where a layer does not allow vmap,
    `on_no_vmap` hears the reason, and each direction takes its own pass.

    Raises GradientError: a layer whose backward pass is not differentiable; a loss that is not one
    number per example.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        functions: LossFunctions,
        batch: Batch,
        weights: Tensor,
        at_once: int = 1,
        on_no_vmap: Callable[[str], None] = lambda reason: None,
    ) -> None:
        self.model, self.at_once, self._on_no_vmap = model, at_once, on_no_vmap
        parameters = [model.get_parameter(name) for name in names]
        with (
            twice_differentiable(model, names),
            PlainWeightNorm(),
            collect_statistics(model) as self._statistics,
        ):
            self._products: HessianProducts | GaussNewtonProducts = (
                HessianProducts(functions.loss, model, batch, weights, parameters)
                if functions.outputs is None
                else GaussNewtonProducts(functions, model, batch, weights, parameters)
            )
        grads = zip(names, self._products.grads, strict=True)
        self._grads = {name: grad for name, grad in grads if grad is not None}
        self.names = list(self._grads)  # the parameters that the batch's loss depends on
        self._weights = self._products.weights.detach()

    def gradient(self) -> dict[str, Tensor]:
        """(D,) per parameter: the sum over the batch of w g."""
        return {name: grad.detach().reshape(-1) for name, grad in self._grads.items()}

    def pull_statistics(self, vectors: Mapping[str, Tensor]) -> Directions:
        """(K, D) per parameter: the derivative of the batch statistics of BatchNorm layers times
        `vectors`, which has (K, 2 C) by layer.
        """
        with twice_differentiable(self.model, self.names):
            parameters = [self.model.get_parameter(name) for name in self.names]
            values = pull_statistics(self._statistics, vectors, parameters)
        return {
            name: value.reshape(len(value), -1)
            for name, value in zip(self.names, values, strict=True)
        }

    def through(
        self, u: Mapping[str, Tensor], by_parameter: bool = False
    ) -> tuple[dict[str, Tensor], Directions]:
        """(B, K) products g(z).u, and H u, for directions `u` of (K, D) per parameter.

        The products are summed over the parameters, under the name "". `by_parameter`: one entry
        per parameter instead; each takes a pass of its own.
        """
        K = len(next(iter(u.values())))
        products: list[dict[str, Tensor]] = []
        curved: list[Directions] = []
        for first in range(0, K, self.at_once):
            directions = [u[name][first : first + self.at_once] for name in self.names]
            try:
                products_of_part, curved_part = self._through(directions, by_parameter)
            except RuntimeError as error:
                if self.at_once == 1 or is_out_of_memory(error):
                    raise explained(error) from error
                self.at_once = 1
                self._on_no_vmap(" ".join(str(error).split())[:100])
                return self.through(u, by_parameter)
            products.append(products_of_part)
            curved.append(curved_part)
        if len(products) == 1:
            return products[0], curved[0]
        return (
            {name: torch.cat([part[name] for part in products], dim=1) for name in products[0]},
            {name: torch.cat([part[name] for part in curved]) for name in self.names},
        )

    def _through(
        self, directions: list[Tensor], by_parameter: bool
    ) -> tuple[dict[str, Tensor], Directions]:
        grads = list(self._grads.values())
        shaped = [
            value.to(grad.dtype).view(-1, *grad.shape)
            for value, grad in zip(directions, grads, strict=True)
        ]
        with twice_differentiable(self.model, self.names):
            parameters = [self.model.get_parameter(name) for name in self.names]
            products_KB, curved = self._products.through(grads, shaped, parameters)
            self._check_products(products_KB, grads, shaped)
            by_name = {"": products_KB.T}
            if by_parameter:
                by_name = {
                    name: self._products.products([grad], [direction]).T
                    for name, grad, direction in zip(self.names, grads, shaped, strict=True)
                }
        pairs = zip(self.names, curved, strict=True)
        return by_name, {name: value.reshape(len(value), -1) for name, value in pairs}

    def _check_products(
        self, products_KB: Tensor, grads: list[Tensor], directions: list[Tensor]
    ) -> None:
        """Raise GradientError unless the sum of w g(z).u is G.u. It is not where a backward pass
        left torch's graph, so that autograd could not differentiate it.
        """
        flat = [
            (direction.reshape(len(direction), -1), grad.detach().flatten())
            for direction, grad in zip(directions, grads, strict=True)
        ]
        totals_K = torch.stack([direction @ grad for direction, grad in flat]).sum(0)
        sizes = [direction.norm(dim=1) * grad.norm() for direction, grad in flat]
        sizes_K = torch.stack(sizes).sum(0)
        weighted_KB = products_KB * self._weights
        difference_K = (weighted_KB.sum(1) - totals_K).abs()
        scale_K = torch.maximum(weighted_KB.abs().sum(1), totals_K.abs())
        if bool((difference_K > 0.01 * scale_K + rounding(totals_K.dtype) * sizes_K).any()):
            raise no_second_derivative(
                "a layer or loss whose backward pass autograd can't differentiate"
            )


class HessianProducts:
    """Products with the Hessian of the loss."""

    def __init__(
        self,
        loss: Callable[[nn.Module, Batch], Tensor],
        model: nn.Module,
        batch: Batch,
        weights: Tensor,
        parameters: list[nn.Parameter],
    ) -> None:
        losses = checked("loss()", loss(model, batch), len(weights))
        self.weights = weights.detach().to(losses.dtype, copy=True).requires_grad_()
        self.grads = differentiable_gradients(losses @ self.weights, parameters)

    def through(
        self, grads: list[Tensor], u: list[Tensor], parameters: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """(K, B) products g(z).u, and H u per parameter."""
        *curved, products_KB = vector_jacobian_products(grads, [*parameters, self.weights], u)
        return products_KB, curved

    def products(self, grads: list[Tensor], u: list[Tensor]) -> Tensor:
        """(K, B)."""
        return vector_jacobian_products(grads, [self.weights], u)[0]


class GaussNewtonProducts:
    """Products with J^T S J. With c = dL/d(outputs), G = J^T c and d(G.u)/dc = J u. Through the
    loss J u becomes S J u and the products g(z).u. A plain backward pass gives J^T S J u.
    """

    def __init__(
        self,
        functions: LossFunctions,
        model: nn.Module,
        batch: Batch,
        weights: Tensor,
        parameters: list[nn.Parameter],
    ) -> None:
        assert functions.outputs is not None
        assert functions.loss_from_outputs is not None
        self.outputs = check_outputs(functions.outputs(model, batch))
        self.cut_outputs = self.outputs.detach().requires_grad_()
        losses = checked(
            "loss_from_outputs()",
            functions.loss_from_outputs(self.cut_outputs, batch),
            len(weights),
        )
        self.weights = weights.detach().to(losses.dtype, copy=True).requires_grad_()
        (output_grads,) = differentiable_gradients(losses @ self.weights, [self.cut_outputs])
        if output_grads is None:
            raise GradientError(
                "loss_from_outputs() does not depend on the outputs",
                "expected: loss() as a function of outputs()",
            )
        self.output_grads = output_grads
        self.cotangent = output_grads.detach().requires_grad_()
        self.grads = differentiable_gradients(self.outputs, parameters, self.cotangent)

    def through(
        self, grads: list[Tensor], u: list[Tensor], parameters: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        """(K, B) products g(z).u, and J^T S J u per parameter."""
        jacobian_u = vector_jacobian_products(grads, [self.cotangent], u)
        curved_outputs, products_KB = vector_jacobian_products(
            [self.output_grads], [self.cut_outputs, self.weights], jacobian_u
        )
        return products_KB, vector_jacobian_products([self.outputs], parameters, [curved_outputs])

    def products(self, grads: list[Tensor], u: list[Tensor]) -> Tensor:
        """(K, B)."""
        jacobian_u = vector_jacobian_products(grads, [self.cotangent], u)
        return vector_jacobian_products([self.output_grads], [self.weights], jacobian_u)[0]


def check_outputs(outputs: Any) -> Tensor:  # whatever the user's function returns
    """The outputs themselves. Raises GradientError unless they are a differentiable tensor."""
    if isinstance(outputs, Tensor) and outputs.requires_grad:
        return outputs
    returned = (
        "a tensor that is not differentiable"
        if isinstance(outputs, Tensor)
        else f"a {type(outputs).__name__}"
    )
    raise GradientError(
        f"outputs() returned {returned}",
        "expected: a tensor (B, ...) that depends on the model's parameters",
    )
