"""Per-example gradients without layer rules: by torch.func for a batch, by plain autograd for one
example.

Letters: B examples.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from influence_cli.gradients.batches import Batch, leaves, map_tensors
from influence_cli.gradients.quantity import Quantity, checked, frozen

LossesAndGradients = tuple[Tensor, dict[str, Tensor]]  # (B,), and per parameter the gradients


class QuantityModule(nn.Module):
    """quantity(model, batch) as a module, so that functional_call can exchange the parameters."""

    def __init__(self, model: nn.Module, quantity: Quantity) -> None:
        super().__init__()
        self.model, self._quantity = model, quantity

    def forward(self, batch: Batch) -> Any:  # the user's batch and tensor
        return self._quantity(self.model, batch)


def gradients_by_torch_func(
    model: nn.Module,
    quantity: Quantity,
    names: Sequence[str],
    label: str,
    batch: Batch,
    batched: Sequence[bool],
) -> LossesAndGradients:
    """Losses (B,) and gradients (B, *shape) of all examples: vmap of the gradient at a batch of
    one.

    `batched`: per tensor of the batch, whether its first axis counts the examples; the examples
    share all other tensors. `label`: what errors call the quantity. Raises whatever vmap raises.
    """
    tensors = [tensor for tensor, has_axis in zip(leaves(batch), batched, strict=True) if has_axis]
    wrapper = QuantityModule(model, quantity)
    parameters = dict(model.named_parameters())
    theta = {name: parameters[name].detach() for name in names}
    places = places_of_parameters(model, {id(parameters[name]): name for name in names})

    def loss_of_one(theta: dict[str, Tensor], *one: Tensor) -> Tensor:
        examples, flags = iter(one), iter(batched)
        single = map_tensors(
            lambda tensor: next(examples).unsqueeze(0) if next(flags) else tensor, batch
        )
        placed = {place: theta[name] for place, name in places.items()}
        losses = functional_call(wrapper, placed, (single,), tie_weights=False)
        return checked(label, losses, 1, traced=True).sum()

    with frozen(model, names):
        per_example = vmap(grad_and_value(loss_of_one), in_dims=(None, *[0] * len(tensors)))
        grads, losses = per_example(theta, *tensors)
    return losses.detach(), {name: grads[name].detach() for name in names}


def places_of_parameters(model: nn.Module, name_of: dict[int, str]) -> dict[str, str]:
    """Each place that holds one of these parameters (by id), and the parameter's name.

    functional_call finds tied parameters itself, but does not restore a module that the model holds
    twice.
    """
    return {
        f"model.{path}.{attribute}".replace("..", "."): name_of[id(parameter)]
        for path, module in model.named_modules()
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in name_of
    }


def gradients_by_autograd(
    model: nn.Module,
    quantity: Quantity,
    names: Sequence[str],
    label: str,
    batch: Batch,
) -> LossesAndGradients:
    """The loss (1,) of a batch of one, and per parameter its gradient. Zeros for a parameter that
    the loss does not depend on.
    """
    parameters = dict(model.named_parameters())
    theta = [parameters[name] for name in names]
    with frozen(model, names), torch.enable_grad():
        losses = checked(label, quantity(model, batch), 1)
        grads = torch.autograd.grad(losses, theta, allow_unused=True)
    dense = [
        torch.zeros_like(value) if grad is None else grad.to_dense() if grad.is_sparse else grad
        for value, grad in zip(theta, grads, strict=True)
    ]
    return losses.detach(), {name: value.detach() for name, value in zip(names, dense, strict=True)}
