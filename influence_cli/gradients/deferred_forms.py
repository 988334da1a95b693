"""Forms that live only from a layer's backward pass to whoever keeps its gradients: what would be
large is formed there, or not at all.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import Dense, Factors, Form, Memo, squares
from influence_cli.gradients.sparse_forms import EmbeddingRows


class DeferredForm(Form):
    """Kept as dense gradients, if at all."""

    def tensors(self) -> dict[str, Tensor]:
        return self.dense().tensors()

    def take(self, index: Tensor) -> Form:
        return self.dense().take(index)

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        return self.dense().dot(queries, memo)

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.dense().matvec(vectors)

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
        factors, rows = self.factors.part(at), self.rows.part(at)
        return TiedForm(self.shape, factors, rows)  # type: ignore[arg-type]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Form:
        factors, rows = self.factors.to(device, dtype), self.rows.to(device, dtype)
        return TiedForm(self.shape, factors, rows)  # type: ignore[arg-type]

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

    def sqnorm(self) -> Tensor:
        """|F|^2 + |R|^2 + 2 <F, R>. A token's row meets only its own column of the left factors.

        Cost: S i for each row.
        """
        squares = self.factors.sqnorm() + self.rows.sqnorm()
        counts = self.rows.offsets.diff()
        N, S, _, i = self.factors.sizes
        most = int(counts.max()) if N else 0
        within = torch.arange(len(self.rows.ids), device=self.device) - torch.repeat_interleave(
            self.rows.offsets[:-1], counts
        )
        values = self.rows.values.new_zeros(N, most, i)  # an example's rows, then zeros
        values[self.rows.example, within] = self.rows.values
        ids = counts.new_zeros(N, most)
        ids[self.rows.example, within] = self.rows.ids
        left = self.factors.left.gather(2, ids.unsqueeze(1).expand(N, S, most))
        both = (
            torch.bmm(self.factors.right, values.transpose(1, 2))
            .mul_(left)
            .sum(2)
            .sum(1, dtype=squares.dtype)
        )
        return (squares + 2 * both).clamp_min_(0)


@dataclass(frozen=True)
class ConvolutionForm(DeferredForm):
    """Gradients of a convolution's weight, taken from its input x and the gradient g at its output
    (both (B m, ...), m rows an example).
    """

    kind = "convolved"
    x: Tensor
    g: Tensor
    rows: int  # of an example
    gradients: Callable[[Tensor, Tensor], Tensor]  # (x, g) -> (rows, D)

    def __len__(self) -> int:
        return len(self.x) // self.rows

    def part(self, at: slice) -> Form:
        inside = slice(at.start * self.rows, at.stop * self.rows)
        return ConvolutionForm(
            self.shape, self.x[inside], self.g[inside], self.rows, self.gradients
        )

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Form:
        return ConvolutionForm(
            self.shape,
            self.x.to(device, dtype),
            self.g.to(device, dtype),
            self.rows,
            self.gradients,
        )

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
