"""The kinds of curvature: which statistics each one needs, and what it falls back to.

hessian and gauss-newton are exact, over all parameters together (training_curvature.py).
The others approximate the mean over training examples of g g^T, block by block: a block is the
weight and the bias of a layer, or one parameter (blocks.py). With the labels of the data that is
the empirical Fisher matrix, with labels drawn from the model the true one. They differ in how a
block is approximated:

fisher    exactly: a D x D matrix of each parameter
shampoo   (L kron R) / tr L, with L = E[G G^T], R = E[G^T G]; exact for gradients of rank one that
          are multiples of one matrix (Morwani et al. 2024, arXiv:2406.17748)
kfac      S kron A, with S = sum over positions of b b^T per example, A = mean over positions of
          a a^T, for G = sum over positions of b a^T (Martens and Grosse 2015, arXiv:1503.05671);
          of convolutions, a is a patch of the input (Grosse and Martens 2016, arXiv:1602.01573)
ekfac     the eigenvectors of kfac, and in them the exact diagonal (George et al. 2018,
          arXiv:1806.03884; Grosse et al. 2023, arXiv:2308.03296)
"""

from dataclasses import dataclass
from typing import Literal

Basis = Literal["full", "moments", "factors"]
# Of a matrix whose eigenvectors are computed: 4,096 inputs and the bias. Longer sides are diagonal.
LONGEST_SIDE = 4097
LARGEST_BLOCK = 2048  # numbers of a parameter whose full matrix is kept


@dataclass(frozen=True)
class CurvatureKind:
    """`basis`: where the eigenvectors of a block come from: its full matrix, L and R, or S and A.
    `is_corrected`: whether a second pass measures the eigenvalues in that basis.
    """

    basis: Basis
    is_corrected: bool = False


KINDS = {
    "ekfac": CurvatureKind("factors", is_corrected=True),
    "kfac": CurvatureKind("factors"),
    "shampoo": CurvatureKind("moments"),
    "fisher": CurvatureKind("full"),
}
EXACT = ("hessian", "gauss-newton")
SOLVERS = ("cg", "lissa")
