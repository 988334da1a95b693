"""Products and squared norms of the rows of matrices, in the fastest way that is right.

Letters: N and Q rows, K and D numbers of a row.
"""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# products by the addresses of their factors, valid while the factors' memory lives
# Any: addresses, shapes and strides
Memo = dict[tuple[Any, ...], tuple[Tensor, StorageWeakRef, StorageWeakRef]]

HALVES = (torch.float16, torch.bfloat16)

# oneDNN's float32 product. On the AMD processor of the benchmarks it is 1.3 times as fast as MKL's,
# and its bits do not depend on the alignment of memory. torch exports it for its compiler only.
ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def products(left: Tensor, right: Tensor, memo: Memo | None = None) -> Tensor:
    """(N, Q) inner products of the rows of (N, K) and (Q, K). `memo`: keeps them for the next call
    with the same tensors.
    """
    key = tuple((value.data_ptr(), value.shape, value.stride()) for value in (left, right))
    if memo is not None and key in memo and not any(storage.expired() for storage in memo[key][1:]):
        return memo[key][0]
    result = (
        ONEDNN_LINEAR(right, left, None, "none", [], "").T
        if ONEDNN_LINEAR and left.is_cpu and left.dtype == torch.float32
        else left @ right.T
    )
    if memo is not None:
        memo[key] = (
            result,
            StorageWeakRef(left.untyped_storage()),
            StorageWeakRef(right.untyped_storage()),
        )
    return result


def squares(values: Tensor) -> Tensor:
    """Sum of squares of each row of an (N, D) tensor, float64.

    It sums 1,024 numbers at a time in the tensor's precision, and these sums in float64. Rows that
    under- or overflow are computed again in float64.
    """
    if (
        values.is_cuda
    ):  # as fast as reading memory, and needs no check, which would wait for the GPU
        return torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()
    if values.dtype in HALVES:
        values = values.float()
    size, width = values.shape
    even_width = width // 1024 * 1024 if width > 2048 else 0
    norms = torch.linalg.vector_norm(values[:, even_width:], dim=1)
    squares = norms.double().square()
    if even_width:
        stretches = torch.linalg.vector_norm(values[:, :even_width].view(size, -1, 1024), dim=2)
        squares += stretches.double().square().sum(1)
    if values.dtype != torch.float64:
        odd = ~in_range(squares, values.dtype)
        if odd.any():
            squares[odd] = values[odd].double().square().sum(1)
    return squares


def largest(values: Tensor) -> Tensor:
    """(..., D) -> (...), float64: the largest magnitude of each row; NaN where a number is."""
    return torch.linalg.vector_norm(values, ord=torch.inf, dim=-1).double()


def in_range(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Which sums of squares lost at most 1e-8 of themselves to under- or overflow."""
    limits = torch.finfo(dtype)
    return (sums > limits.tiny * 1e8) & (sums < limits.max)
