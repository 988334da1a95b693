"""Second derivatives by autograd: a backward pass through a backward pass.

Letters: K directions.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from influence_cli.errors import GradientError
from influence_cli.gradients.quantity import frozen


def differentiable_gradients(
    total: Tensor, parameters: Sequence[Tensor], vector: Tensor | None = None
) -> list[Tensor | None]:
    """The gradients of `total` (of its inner product with `vector`), with a graph of their own.
    None for a parameter that `total` does not depend on.
    """
    try:
        grads = torch.autograd.grad(total, parameters, vector, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise explained(error) from error
    return [grad if grad is None or not grad.is_sparse else grad.to_dense() for grad in grads]


def vector_jacobian_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], vectors: Sequence[Tensor]
) -> list[Tensor]:
    """For each input (K, *shape): the derivative of the sum of outputs x vectors, for each of the K
    `vectors` of an output. Zeros where an output does not depend on an input.
    """
    K = len(vectors[0])
    connected = [pair for pair in zip(outputs, vectors, strict=True) if pair[0].requires_grad]
    if not connected:  # a loss that is linear in the parameters
        return [value.new_zeros(K, *value.shape) for value in inputs]
    values, directions = zip(*connected, strict=True)
    differentiable = [value for value in inputs if value.requires_grad]
    batched = K > 1  # vmap fails where a custom backward reads numbers, so not for one direction
    grads = torch.autograd.grad(
        values,
        differentiable,
        directions if batched else [direction[0] for direction in directions],
        retain_graph=True,
        allow_unused=True,
        is_grads_batched=batched,
    )
    grad_of = {
        id(value): grad if batched else grad[None]
        for value, grad in zip(differentiable, grads, strict=True)
        if grad is not None
    }
    return [
        grad_of[id(value)].detach() if id(value) in grad_of else value.new_zeros(K, *value.shape)
        for value in inputs
    ]


@contextlib.contextmanager
def twice_differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Use kernels whose backward pass is differentiable: attention as plain products, no cuDNN,
    dense gradients of embeddings.
    """
    sparse = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    try:
        for module in sparse:
            module.sparse = False
        with (
            frozen(model, names),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        for module in sparse:
            module.sparse = True


class PlainWeightNorm(TorchFunctionMode):
    """Compute weight norm with plain operations: torch 2.13's kernel treats the norms as constants
    in a second derivative.
    """

    # Any: the signature of torch's modes
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def explained(error: RuntimeError) -> Exception:
    """A GradientError if torch lacks a second derivative, else the error itself."""
    if "is not implemented" not in str(error) and "double backward" not in str(error).lower():
        return error
    return no_second_derivative(str(error).splitlines()[0])


def no_second_derivative(reason: str) -> GradientError:
    return GradientError(
        f"exact curvature needs a second derivative that torch does not have: {reason}",
        "expected: layers and losses whose backward pass is differentiable",
        "--layers excludes a layer; another operation may compute the same (Embedding and a mean "
        "for EmbeddingBag)",
        "--method dve uses the empirical Fisher, which needs first derivatives only",
    )
