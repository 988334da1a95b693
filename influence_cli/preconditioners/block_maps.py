"""The inverse curvature of one block, as a map of gradients.

Letters: N gradients, O x I one of them as a matrix, D = O I, S positions, T rows of tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import Factors, Form
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.preconditioners.block_statistics import BlockMoments


@dataclass(frozen=True)
class BlockMap:
    """H = (left kron right) diag(eigenvalues) (left kron right)^T; None: the identity.

    `eigenvalues`: (O, I), not below 0.
    """

    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.eigenvalues.shape
        return rows, columns

    @property
    def mean(self) -> float:
        """The mean eigenvalue: the mean square of a number of the gradients."""
        return float(self.eigenvalues.mean())

    def solve(self, values_ND: Tensor, damping: float) -> Tensor:
        """(H + damping)^{-1} of each row, float64."""
        rotated = self._multiply(values_ND.double(), transpose=True)
        return self._multiply((rotated / (self.eigenvalues + damping).flatten()), transpose=False)

    def sqnorms(self, form: Form, damping: float) -> Tensor:
        """(N,) of g^T (H + damping)^{-1} g, float64. It forms no dense gradient where the form has
        one position, or few rows of an embedding.
        """
        inverse_OI = 1 / (self.eigenvalues + damping)
        if isinstance(form, EmbeddingRows) and self.left is None:
            values_Td = form.values.flatten(1).double()
            rotated = values_Td if self.right is None else values_Td @ self.right
            squares_T = (rotated.square() * inverse_OI[form.ids]).sum(1)
            return squares_T.new_zeros(len(form)).index_add_(0, form.example, squares_T)
        if isinstance(form, Factors) and form.left.shape[1] == 1 and not self.is_full:
            left, right = form.left[:, 0].double(), form.right[:, 0].double()
            left = left if self.left is None else left @ self.left
            right = right if self.right is None else right @ self.right
            return ((left.square() @ inverse_OI) * right.square()).sum(1)
        parts = [
            self._multiply(values.double(), transpose=True).square() @ inverse_OI.flatten()
            for _, values in form.parts()
        ]
        return torch.cat(parts) if parts else inverse_OI.new_zeros(0)

    @property
    def is_full(self) -> bool:
        """Whether `left` is the eigenvectors of all numbers of a gradient, (D, D)."""
        return self.left is not None and self.left.shape[0] != self.shape[0]

    def _multiply(self, values_ND: Tensor, transpose: bool) -> Tensor:
        """Each row times the eigenvectors, or their transpose."""
        if self.left is not None and self.left.shape[0] == values_ND.shape[1]:
            return values_ND @ (self.left if transpose else self.left.T)
        values = values_ND.view(len(values_ND), *self.shape)
        if self.left is not None:
            values = (self.left.T if transpose else self.left) @ values
        if self.right is not None:
            values = values @ (self.right if transpose else self.right.T)
        return values.reshape(len(values_ND), -1)

    def tensors(self) -> dict[str, Tensor]:
        named = {"left": self.left, "right": self.right, "eigenvalues": self.eigenvalues}
        return {name: value for name, value in named.items() if value is not None}


def eigenvectors(sums: Tensor, count: int) -> tuple[Tensor | None, Tensor]:
    """Eigenvectors in columns and eigenvalues of sums / count; of a diagonal no eigenvectors.

    Rounding may give small negative eigenvalues of a sum of squares: they are 0.
    """
    if sums.dim() == 1:
        return None, sums / max(1, count)
    values, vectors = torch.linalg.eigh(sums / max(1, count))
    return vectors, values.clamp_min(0)


def map_of_moments(moments: BlockMoments) -> BlockMap:
    """The curvature that the first pass gives."""
    left, left_values = eigenvectors(moments.left, moments.examples)
    if moments.basis == "full":
        return BlockMap(left, None, left_values.reshape(moments.shape))
    counts = moments.positions if moments.basis == "factors" else moments.examples
    right, right_values = eigenvectors(moments.right, counts)
    eigenvalues = left_values[:, None] * right_values
    if moments.basis == "moments":
        trace = float(left_values.sum())
        eigenvalues = eigenvalues / trace if trace else eigenvalues
    return BlockMap(left, right, eigenvalues)
