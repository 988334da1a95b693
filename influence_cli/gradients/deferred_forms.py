"""Forms that live only from a layer's backward pass until capture stores its gradients. Large
tensors are formed at that point, or never.

Letters: N examples, S positions, o x i a weight, D numbers of a parameter, m rows of the layer's
batch per example.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import Dense, Factors, Form, Positions
from influence_cli.gradients.row_products import Memo, largest, products, squares
from influence_cli.gradients.sparse_forms import EmbeddingRows


class DeferredForm(Form):
    """A form that is stored as dense gradients."""

    def tensors(self) -> dict[str, Tensor]:
        return self.dense().tensors()

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        return self.matvec(queries.dense().values.T)

    def matvec(self, vectors: Tensor) -> Tensor:
        return torch.cat([products(part, vectors.T) for _, part in self.parts()])

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.dense().rmatvec(weights)


@dataclass(frozen=True)
class TiedForm(DeferredForm):
    """The sum of factors and rows: a weight that is both an embedding and a linear layer's."""

    kind = "tied"
    factors: Factors
    rows: EmbeddingRows

    def __len__(self) -> int:
        return len(self.factors)

    def part(self, at: slice) -> Form:
        return self._with(self.factors.part(at), self.rows.part(at))

    def take(self, index: Tensor) -> Form:
        return self._with(self.factors.take(index), self.rows.take(index))

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Form:
        return self._with(self.factors.to(device, dtype), self.rows.to(device, dtype))

    def _with(self, factors: Form, rows: Form) -> Form:
        assert isinstance(factors, Factors)
        assert isinstance(rows, EmbeddingRows)
        return TiedForm(self.shape, factors, rows)

    @property
    def device(self) -> torch.device:
        return self.factors.device

    @property
    def dtype(self) -> torch.dtype:
        return self.factors.dtype

    def dense(self) -> Dense:
        values = self.factors.dense().values
        values.view(len(self), self.shape[0], -1)[self.rows.example, self.rows.ids] += (
            self.rows.values
        )  # an example's ids are distinct
        return Dense(self.shape, values)

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.factors.matvec(vectors) + self.rows.matvec(vectors)

    def sqnorm(self) -> Tensor:
        """|F|^2 + |R|^2 + 2 <F, R>. A token's row multiplies only its own column of the left
        factors. Cost: S i per row.
        """
        squares = self.factors.sqnorm() + self.rows.sqnorm()
        counts = self.rows.offsets.diff()
        N, S, _, i = self.factors.sizes
        longest = int(counts.max()) if N else 0
        within = torch.arange(len(self.rows.ids), device=self.device) - torch.repeat_interleave(
            self.rows.offsets[:-1], counts
        )
        values = self.rows.values.new_zeros(N, longest, i)  # an example's rows, then zeros
        values[self.rows.example, within] = self.rows.values
        ids = counts.new_zeros(N, longest)
        ids[self.rows.example, within] = self.rows.ids
        left = self.factors.left.gather(2, ids.unsqueeze(1).expand(N, S, longest))
        both = (
            torch.bmm(self.factors.right, values.transpose(1, 2))
            .mul_(left)
            .sum(2)
            .sum(1, dtype=squares.dtype)
        )
        return (squares + 2 * both).clamp_min_(0)

    def magnitude(self) -> Tensor:
        return self.factors.magnitude() + self.rows.magnitude()


@dataclass(frozen=True)
class ConvolutionForm(DeferredForm):
    """Gradients of a convolution's weight, from its input x (N m, ...) and the gradient g at its
    output (N m, ...).
    """

    kind = "convolved"
    x: Tensor
    g: Tensor
    rows: int  # m
    gradients: Callable[[Tensor, Tensor], Tensor]  # (x, g) -> (rows, D)
    outer_products: Callable[[Tensor, Tensor], Iterator[Positions]]  # (x, g) -> the places

    def __len__(self) -> int:
        return len(self.x) // self.rows

    def part(self, at: slice) -> Form:
        return self._at(slice(at.start * self.rows, at.stop * self.rows))

    def take(self, index: Tensor) -> Form:
        rows = index[:, None] * self.rows + torch.arange(self.rows, device=index.device)
        return self._at(rows.flatten())

    def _at(self, rows: slice | Tensor) -> Form:
        return dataclasses.replace(self, x=self.x[rows], g=self.g[rows])

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Form:
        x, g = self.x.to(device, dtype), self.g.to(device, dtype)
        return dataclasses.replace(self, x=x, g=g)

    def positions(self) -> Iterator[Positions]:
        return self.outer_products(self.x, self.g)

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def dense(self) -> Dense:
        values = self.gradients(self.x, self.g)
        return Dense(
            self.shape,
            values if self.rows == 1 else values.view(-1, self.rows, values.shape[1]).sum(1),
        )

    def sqnorm(self) -> Tensor:
        return torch.cat([squares(part) for _, part in self.parts()])

    def magnitude(self) -> Tensor:
        return (largest(self.x.flatten(1)) * largest(self.g.flatten(1))).view(-1, self.rows).sum(1)
