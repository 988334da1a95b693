"""The kinds of random projections.

A parameter of shape (o, ...) is a matrix of o rows and i columns. Its gradient is a sum over
positions of outer products left (o) x right (i). All kinds but `sparse` project the two sides one
by one and form no o x i numbers. The random numbers of the two sides are independent.

tensor-sketch  count sketches of both sides, multiplied as polynomials (tensor_sketch.py)
sparse         a count sketch of the gradient itself
khatri-rao     coordinate j = q_j^T G p_j / sqrt(K), with signs q and p
kronecker      A G B^T with Gaussian A (k x o) and B (k x i), K = k^2: for comparison with papers;
               its error is far larger

Letters: N examples (n: some of them), S positions, T rows of an embedding, F columns of a table, K
projected numbers.
"""

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from influence_cli.gradients.forms import PART_BYTES, Factors, Form
from influence_cli.gradients.projection_map import FactoredMap, ProjectionMap
from influence_cli.gradients.random_tables import Tables
from influence_cli.gradients.row_products import products, squares
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.gradients.tensor_sketch import TensorSketch


class TwoSidedMap(FactoredMap):
    """Kinds that have a table for each side: `left` (o, F) and `right` (F', i)."""

    left: Tensor
    right: Tensor

    @property
    @abstractmethod
    def width(self) -> int:
        """K."""

    @abstractmethod
    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        """(N, S, F) and (N, S, F') -> (N, K), summed over the positions."""

    def factors(self, form: Factors) -> Tensor:
        """Cost S (o F + i F') per example."""
        N, S, o, i = form.sizes
        columns = self.left.shape[1] + len(self.right)
        step = max(1, PART_BYTES // (2 * S * columns * form.left.element_size()))
        left, right = form.left.reshape(-1, o), form.right.reshape(-1, i)
        values = []
        for first in range(0, N, step):
            at = slice(first * S, min(first + step, N) * S)
            left_nSF = products(left[at], self.left.T).unflatten(0, (-1, S))
            right_nSF = products(right[at], self.right).unflatten(0, (-1, S))
            values.append(self.combine(left_nSF, right_nSF))
        return torch.cat(values)

    def dense(self, part: Tensor) -> Tensor:
        """Of (n, o i) gradients; each row of the matrix is a position. Cost o i F' per example."""
        n, o, i = len(part), len(self.left), self.right.shape[1]
        right_noF = products(part.reshape(n * o, i), self.right).view(n, o, -1)
        return self.combine(self.left.expand(n, *self.left.shape), right_noF)

    def rows(self, form: EmbeddingRows) -> Tensor:
        """Of an embedding's rows; a row's token chooses the row of the left table."""
        step = max(1, PART_BYTES // (2 * self.width * form.values.element_size()))
        out = form.values.new_zeros(len(form), self.width)
        for first in range(0, len(form.ids), step):
            at = slice(first, first + step)
            left, right = self.left[form.ids[at]], products(form.values[at], self.right)
            out.index_add_(0, form.example[at], self.combine(left.unsqueeze(1), right.unsqueeze(1)))
        return out


class KhatriRao(TwoSidedMap):
    def __init__(self, tables: Tables, numbers: int) -> None:
        self.left = tables.signs("left", tables.rows, numbers) / math.sqrt(numbers)
        self.right = tables.signs("right", numbers, tables.columns)

    @property
    def width(self) -> int:
        return self.left.shape[1]

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1)


class Kronecker(TwoSidedMap):
    def __init__(self, tables: Tables, numbers: int) -> None:
        root = math.isqrt(numbers)
        self.left = tables.normal("left", tables.rows, root) / math.sqrt(root)
        self.right = tables.normal("right", root, tables.columns) / math.sqrt(root)

    @property
    def width(self) -> int:
        return self.left.shape[1] * len(self.right)

    def combine(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)


class Sparse(ProjectionMap):
    """As good as a dense Gaussian map. It forms the gradients, some examples at a time."""

    def __init__(self, tables: Tables, numbers: int) -> None:
        self.numbers, count = numbers, tables.rows * tables.columns
        self.signs = tables.signs("both", count)
        self.places = torch.from_numpy(tables.order("both", count) % numbers).to(tables.device)

    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        norms, values = [], []
        for _, part in form.parts():
            norms.append(squares(part))
            # transposed, so that index_add_ adds whole rows: one number of all examples
            signed = (part * self.signs).T.contiguous()
            sums = signed.new_zeros(self.numbers, len(part)).index_add_(0, self.places, signed)
            values.append(sums.T)
        return torch.cat(norms), torch.cat(values)


KINDS: dict[str, Callable[[Tables, int], ProjectionMap]] = {
    "tensor-sketch": TensorSketch,
    "sparse": Sparse,
    "khatri-rao": KhatriRao,
    "kronecker": Kronecker,
}
