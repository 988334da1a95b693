"""Sums over the training gradients of one block, from which its curvature is made.

Letters: N examples, S positions, O x I the gradient of an example as a matrix, D = O I numbers.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_cli.gradients.forms import Factors, Form, Projected
from influence_cli.gradients.row_products import HALVES
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.preconditioners.kinds import LARGEST_BLOCK, LONGEST_SIDE, Basis


def matrix_shape(form: Form) -> tuple[int, int]:
    """(O, I): a vector, and projected numbers, are a matrix with one column."""
    if isinstance(form, Projected) or len(form.shape) < 2:
        return (form.dense().values.shape[1] if isinstance(form, Projected) else form.shape[0]), 1
    return form.shape[0], math.prod(form.shape[1:])


def choose_basis(form: Form, wanted: Basis) -> Basis:
    """The basis that these gradients allow: factors only where the form knows its
    positions, a full matrix only for few numbers.
    """
    rows, columns = matrix_shape(form)
    if columns == 1 and rows <= LARGEST_BLOCK:
        return "full"  # L of a vector is its full matrix
    if wanted == "full" and rows * columns > LARGEST_BLOCK:
        return "moments"
    if wanted == "factors" and form.positions() is None:
        return "moments"
    return wanted


def matrices(form: Form) -> Iterator[Tensor]:
    """(n, O, I) the gradients of some examples at a time. The next part may overwrite it."""
    shape = matrix_shape(form)
    for _, values in form.parts():
        yield values.view(len(values), *shape)


def new_side(length: int, is_diagonal: bool = False) -> Tensor:
    """Zeros: (n, n), or (n,) for a side that is too long for a matrix."""
    is_matrix = length <= LONGEST_SIDE and not is_diagonal
    return torch.zeros((length, length) if is_matrix else (length,), dtype=torch.float64)


def add_products(total: Tensor, rows_NX: Tensor) -> None:
    """total += rows^T rows, or its diagonal. Products have the precision of the rows, sums of units
    float64.
    """
    if total.dim() == 2:
        total += rows_NX.T @ rows_NX
    else:
        total += rows_NX.square().sum(0)


@dataclass(frozen=True)
class PositionSums:
    """Of some examples: the sums of b b^T and of a a^T over the positions of G = sum of b a^T."""

    left: Tensor
    right: Tensor
    positions: int

    @classmethod
    def of(cls, form: Form, bias_axis: int | None = None) -> "PositionSums | None":
        """None: the form does not know its positions. Positions whose input or output gradient is
        0 are padding: they add nothing to a gradient. `bias_axis`: the form is that of a weight,
        and its bias is to be appended (blocks.py).
        """
        if (outer_products := form.positions()) is None:
            return None
        lengths = list(matrix_shape(form))
        if bias_axis is not None:
            lengths[bias_axis] += 1
        left, right = (new_side(length).to(form.device) for length in lengths)
        count = 0
        for at, left_PO, right_PI in outer_products:
            if bias_axis == 1:
                right_PI = with_ones(right_PI)
            elif bias_axis == 0:
                at, left_PO = slice(0, lengths[0]), with_ones(left_PO)
            # abs().amax() is 5 times as fast as ne(0).any()
            is_position = (left_PO.abs().amax(1) != 0) & (right_PI.abs().amax(1) != 0)
            positions = int(is_position.sum())
            if positions < len(is_position):
                left_PO, right_PI = left_PO[is_position], right_PI[is_position]
            block = left[at, at] if left.dim() == 2 else left[at]
            add_products(block, widened(left_PO))
            add_products(right, widened(right_PI))
            count += positions
        return cls(left, right, count)


def with_ones(values: Tensor) -> Tensor:
    """(..., I) followed by 1."""
    return torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)


def widened(values: Tensor) -> Tensor:
    """Half precision as float32, in which products are summed."""
    return values.float() if values.dtype in HALVES else values


@dataclass
class BlockMoments:
    """The first pass over one block. `left`: (O, O) or (O,), `right`: (I, I) or (I,); of the
    basis "full" `left` is (D, D) and `right` is empty. `examples`, `positions`: what they sum over.
    """

    basis: Basis
    shape: tuple[int, int]
    left: Tensor
    right: Tensor
    examples: int = 0
    positions: int = 0

    @classmethod
    def start(cls, form: Form, wanted: Basis) -> "BlockMoments":
        basis, shape = choose_basis(form, wanted), matrix_shape(form)
        if basis == "full":
            empty = torch.zeros(0, 0, dtype=torch.float64)
            return cls(basis, shape, new_side(shape[0] * shape[1]), empty)
        left = new_side(shape[0], is_diagonal=isinstance(form, EmbeddingRows))
        return cls(basis, shape, left, new_side(shape[1]))

    @classmethod
    def of_positions(cls, sums: PositionSums, examples: int) -> "BlockMoments":
        """What PositionSums.of made of these examples."""
        shape = len(sums.left), len(sums.right)
        left, right = sums.left.cpu(), sums.right.cpu()
        return cls("factors", shape, left, right, examples, sums.positions)

    def add(self, form: Form) -> None:
        """The gradients of some more examples."""
        self.examples += len(form)
        if self.basis == "full":
            for part_NOI in matrices(form):
                add_products(self.left, part_NOI.flatten(1))
        elif self.basis == "factors":
            sums = PositionSums.of(form)
            assert sums is not None
            self._add_positions(sums)
        elif isinstance(form, Factors) and form.left.shape[1] == 1:
            self._add_outer_products(form)
        elif isinstance(form, EmbeddingRows) and self.left.dim() == 1:
            self._add_embedding_rows(form)
        else:
            for part_NOI in matrices(form):
                add_products(self.left, part_NOI.transpose(1, 2).flatten(0, 1))
                add_products(self.right, part_NOI.flatten(0, 1))

    def merge(self, other: "BlockMoments") -> None:
        """The sums over other examples."""
        self.examples += other.examples
        self.positions += other.positions
        self.left += other.left
        self.right += other.right

    def _add_positions(self, sums: PositionSums) -> None:
        self.positions += sums.positions
        self.left += sums.left.to(self.left.device)
        self.right += sums.right.to(self.right.device)

    def _add_outer_products(self, form: Factors) -> None:
        """G = b a^T: G G^T = |a|^2 b b^T, and G^T G = |b|^2 a a^T."""
        left, right = form.left[:, 0], form.right[:, 0]
        add_products(self.left, left * right.norm(dim=1, keepdim=True))
        add_products(self.right, right * left.norm(dim=1, keepdim=True))

    def _add_embedding_rows(self, form: EmbeddingRows) -> None:
        """Rows of few tokens each. The side of tokens keeps its diagonal alone."""
        values = form.values.flatten(1)
        add_products(self.right, values)
        self.left.index_add_(0, form.ids, values.double().square().sum(1))

    def tensors(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.examples, self.positions, *self.shape])
        return {"left": self.left, "right": self.right, "counts": counts}


@dataclass
class BlockDiagonal:
    """The second pass: (O, I) sums of the squared gradients in a basis of eigenvectors. A side
    without eigenvectors stays as it is.
    """

    left: Tensor | None  # (O, O), eigenvectors in columns
    right: Tensor | None  # (I, I)
    shape: tuple[int, int]
    total: Tensor = field(default_factory=lambda: torch.zeros(0))
    examples: int = 0

    def __post_init__(self) -> None:
        if not self.total.numel():
            self.total = torch.zeros(self.shape, dtype=torch.float64)

    def add(self, form: Form) -> None:
        self.examples += len(form)
        left, right = (
            None if side is None else side.to(form.dtype) for side in (self.left, self.right)
        )
        if isinstance(form, Factors):
            self._add_factors(form, left, right)
        elif isinstance(form, EmbeddingRows) and left is None:
            values = form.values.flatten(1)
            rotated = values if right is None else values @ right
            self.total.index_add_(0, form.ids, rotated.double().square())
        else:
            for part_NOI in matrices(form):
                rotated = part_NOI if left is None else left.T @ part_NOI
                rotated = rotated if right is None else rotated @ right
                self.total += rotated.square().sum(0)

    def _add_factors(self, form: Factors, left: Tensor | None, right: Tensor | None) -> None:
        lefts = form.left if left is None else form.left @ left
        rights = form.right if right is None else form.right @ right
        if lefts.shape[1] == 1:
            self.total += lefts[:, 0].square().T @ rights[:, 0].square()
            return
        for _, values in Factors(form.shape, lefts, rights).parts():
            self.total += values.view(len(values), *self.shape).square().sum(0)
