"""Inner products of float32 gradients of any size, without overflow or underflow.

Queries whose numbers are far from 1 are divided by a power of two. Training gradients of such norms
are multiplied in float64. Both are rare, so all other products cost what they did.

Letters: N train, Q query, D gradient.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.errors import InfluenceError
from influence_cli.gradients.form_ops import scale_rows
from influence_cli.gradients.forms import Form
from influence_cli.gradients.row_products import Memo
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings

TINY = torch.finfo(torch.float64).tiny  # smaller numbers lose digits
# Norms of training gradients. Times a query's numbers, which are between 1e-12 and 1e12
# (scale_rows), products keep float32's digits: they are between 1e-36 and 1e36.
SMALLEST_NORM, LARGEST_NORM = 1e-24, 1e24
SMALLEST_PRODUCT, LARGEST_PRODUCT = 1e-30, 1e36
# Numbers of training gradients: a sum of 10^9 products with such numbers is below 1e36.
SMALLEST_NUMBER, LARGEST_NUMBER = 1e-24, 1e15


@dataclass(frozen=True)
class ScaledQueries:
    """Gradients of queries, each divided by its `scale_Q` (None: by 1)."""

    form: Form
    scale_Q: Tensor | None

    @classmethod
    def of(cls, form: Form) -> "ScaledQueries":
        return cls(*scale_rows(form))

    def to(self, device: torch.device) -> "ScaledQueries":
        return ScaledQueries(self.form.to(device), self.scale_Q)


def extreme_norms(sqnorms: Tensor) -> Tensor:
    """Mask of the squared norms whose products may leave the range of float32."""
    low, high = SMALLEST_NORM**2, LARGEST_NORM**2
    return (sqnorms > 0) & ((sqnorms < low) | (sqnorms > high))


def inner_products(
    rows_ND: Form,
    queries: ScaledQueries,
    device: torch.device,
    extreme_N: Tensor | None = None,
    memo: Memo | None = None,
) -> Tensor:
    """(N, Q), computed on the device in the wider of the two precisions.

    `extreme_N`: training gradients that need float64, None for none; then the result is float64.
    """
    wide = torch.float64 if is_double(rows_ND, queries) else torch.float32
    scores_NQ = rows_ND.to(device, wide).dot(queries.form.to(device, wide), memo)
    if extreme_N is not None and extreme_N.any() and wide == torch.float32:
        cpu = torch.device("cpu")
        some = rows_ND.take(extreme_N.nonzero().flatten()).to(cpu, torch.float64)
        scores_NQ = scores_NQ.to(cpu, torch.float64)
        scores_NQ[extreme_N] = some.dot(queries.form.to(cpu, torch.float64))
    if queries.scale_Q is not None:
        scores_NQ = scores_NQ.cpu().double() * queries.scale_Q
    return scores_NQ


def is_double(rows_ND: Form, queries: ScaledQueries) -> bool:
    """Whether they are multiplied in float64."""
    return torch.float64 in (rows_ND.dtype, queries.form.dtype)


def products_in_range(
    rows_ND: Form, queries: ScaledQueries, device: torch.device, memo: Memo | None = None
) -> tuple[Tensor, Tensor | None]:
    """(N, Q) inner products, and squared norms (N,), infinite where they are not known.

    Norms are computed only of gradients with a product that is zero, tiny, or not finite. Their
    squared norm is NaN where a gradient is not finite. A product of rows of an embedding skips
    tokens, and a GPU would wait for such a look: there, norms of all gradients are computed.
    """
    scores_NQ = inner_products(rows_ND, queries, device, memo=memo)
    if isinstance(rows_ND, EmbeddingRows | Postings) or not scores_NQ.is_cpu:
        doubtful = torch.arange(len(rows_ND), device=rows_ND.device)
        sqnorms = rows_ND.sqnorm()
    else:
        doubtful = doubtful_rows(scores_NQ)
        if not len(doubtful):
            return scores_NQ, None
        sqnorms = rows_ND.take(doubtful).sqnorm()
    extreme = doubtful[extreme_norms(sqnorms)]
    if len(extreme) and not is_double(rows_ND, queries):
        scores_NQ = in_float64(scores_NQ, rows_ND, queries, extreme)
    sqnorms = sqnorms.masked_fill(sqnorms.isinf(), torch.nan)
    unknown = torch.full((len(rows_ND),), torch.inf, dtype=torch.float64, device=sqnorms.device)
    return scores_NQ, unknown.index_copy(0, doubtful, sqnorms.double())


def products_unwatched(
    rows_ND: Form, queries: ScaledQueries, device: torch.device, memo: Memo | None = None
) -> tuple[Tensor, Tensor]:
    """(N, Q) inner products, and a mask (N,) of the gradients that need another look: one that is
    not finite, or whose float32 products may leave their range. A GPU is not waited for.
    """
    scores_NQ = inner_products(rows_ND, queries, device, memo=memo)
    sizes = rows_ND.magnitude()
    if is_double(rows_ND, queries):
        return scores_NQ, ~sizes.isfinite()
    return scores_NQ, ~((sizes == 0) | ((sizes >= SMALLEST_NUMBER) & (sizes <= LARGEST_NUMBER)))


def doubtful_rows(scores_NQ: Tensor) -> Tensor:
    """Positions of the rows with a product that may have lost digits, or is not finite."""
    sizes = scores_NQ.abs()
    if not sizes.numel():
        return torch.arange(0)
    low, high = (float(value) for value in sizes.aminmax())
    if low >= SMALLEST_PRODUCT and high <= LARGEST_PRODUCT:  # False for NaN
        return torch.arange(0)
    sound = (sizes >= SMALLEST_PRODUCT) & (sizes <= LARGEST_PRODUCT)
    return (~sound).any(1).nonzero().flatten()


def in_float64(scores_NQ: Tensor, rows_ND: Form, queries: ScaledQueries, at: Tensor) -> Tensor:
    """The scores as float64, those of some rows computed in float64, on the CPU."""
    cpu = torch.device("cpu")
    some = rows_ND.take(at).to(cpu, torch.float64)
    scores_NQ = scores_NQ.to(cpu, torch.float64)
    exact_NQ = some.dot(queries.form.to(cpu, torch.float64))
    scores_NQ[at.cpu()] = exact_NQ if queries.scale_Q is None else exact_NQ * queries.scale_Q
    return scores_NQ


def inverse_of_norms(norms: Tensor) -> Tensor:
    """1 / norm; 0 where a gradient is zero. NaN for a norm past float64, so that no score of it
    looks right.
    """
    inverse = torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
    return inverse.masked_fill(norms.isinf(), torch.nan)


def refuse_underflow(largest_score: float, any_product: bool) -> None:
    """Raise InfluenceError where all scores are too small for float64, and not all products are
    zero.
    """
    if any_product and largest_score < TINY:
        raise InfluenceError(
            "all scores underflow: they are too small for float64",
            f"the largest is {largest_score:g}; expected: at least {TINY:.3g}",
            "choose a larger --lr, or --lr-weights none; look for a loss that is scaled down",
        )
