"""Tensors that belong to all examples: parameters, and what a model computes from parameters alone.

Letters: B examples, D numbers of a parameter.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class SharedTensors:
    """The shared tensors of one forward pass."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self._name_of = {id(parameter): name for name, parameter in parameters.items()}
        # by id; holding the tensors keeps the ids valid
        self._tensors: dict[int, Tensor] = {
            id(parameter): parameter for parameter in parameters.values()
        }

    def __contains__(self, value: Tensor) -> bool:
        """Also a view of a shared tensor: attention splits its packed weights where no hook sees
        it.
        """
        if (
            id(value) not in self._tensors
            and value._base is not None
            and id(value._base) in self._tensors
            and value.requires_grad
        ):
            self._tensors[id(value)] = value
        return id(value) in self._tensors

    def add(self, values: Iterable[Tensor]) -> None:
        """Results of an operation that read shared tensors alone."""
        self._tensors |= {id(value): value for value in values if value.requires_grad}

    def name(self, value: Tensor) -> str | None:
        """The name of a parameter, None for a computed tensor."""
        return self._name_of.get(id(value))

    def owners(self, value: Tensor) -> set[str]:
        """The parameters that a shared tensor is, or is computed from."""
        if id(value) in self._name_of:
            return {self._name_of[id(value)]}
        owners, todo, visited = set(), [value.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            owners.add(self._name_of.get(id(getattr(node, "variable", None)), ""))
            todo += [following for following, _ in node.next_functions]
        return owners - {""}

    def pull_back(self, value: Tensor, grads: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """From gradients (B, *shape) at a computed tensor to gradients (B, D) of its parameters."""
        parameters = list(self.parameters.values())
        pulled = torch.autograd.grad(
            value, parameters, grads, is_grads_batched=True, allow_unused=True, retain_graph=True
        )
        for parameter, grad in zip(parameters, pulled, strict=True):
            if grad is not None:
                yield parameter, grad.detach().reshape(len(grads), -1)


def sum_over_copies(grads: Tensor, value: Tensor, copies: Tensor, dim: int) -> Tensor:
    """(B, D) from gradients (B, ...) at `copies` of a shared `value`, summed over the axes along
    which the value was repeated.

    `dim`: the axis of the copies that counts examples, which `grads` has in front.
    """
    shape = [1] * (copies.ndim - value.ndim) + list(value.shape)
    del shape[dim]
    repeated = [axis + 1 for axis, n in enumerate(shape) if n == 1 and grads.shape[axis + 1] != 1]
    return (grads.sum(repeated) if repeated else grads).reshape(len(grads), -1)
