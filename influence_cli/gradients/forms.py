"""The forms of per-example gradients: dense numbers and factors, and the interface of all forms.

A form is a matrix of N rows and D columns. It multiplies with other gradients (`dot`) and with
vectors (`matvec`), its transpose multiplies with vectors (`rmatvec`), and it gives squared norms of
its rows. Counts choose the cheapest form: bytes on disk, multiplications in products.

Letters: N examples, Q queries, D numbers of a parameter (of shape o x i), S positions, K vectors or
projected numbers.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from influence_cli.gradients.row_products import (
    HALVES,
    Memo,
    in_range,
    largest,
    products,
    squares,
)

PART_BYTES = 16 << 20  # dense gradients that are computed from factors at once
# Matrices from this size on are multiplied in slices of their rows, which stay in the CPU's cache.
SLICED_BYTES, SLICE_BYTES = 2 << 20, 12 << 20
LEAST_ROWS, MOST_ROWS = 32, 256  # of a slice

# rows (o',) of the matrix o x i, and P outer products: left (P, o') and right (P, i)
Positions = tuple[slice, Tensor, Tensor]


@dataclass(frozen=True)
class Form(ABC):
    """The gradients of N examples for one parameter of `shape`."""

    kind: ClassVar[str]
    shape: tuple[int, ...]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What the cache stores, by name. Floating-point tensors have rows on their first axis."""

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def dense(self) -> "Dense":
        """The same gradients as an N x D matrix."""

    @abstractmethod
    def take(self, index: Tensor) -> "Form":
        """The examples at these positions, in this order."""

    def part(self, at: slice) -> "Form":
        """Consecutive examples, as a view of the same memory."""
        return type(self)(self.shape, **{name: value[at] for name, value in self.tensors().items()})

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Dense matrices (n, D) of some examples at a time. The next one may overwrite it."""
        numbers = torch.Size(self.shape).numel() * torch.finfo(self.dtype).bits // 8
        step = max(1, PART_BYTES // max(1, numbers))
        for first in range(0, len(self), step):
            at = slice(first, min(first + step, len(self)))
            yield at, self.part(at).dense().values

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Form":
        tensors = self.tensors()
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in tensors.items()
        }
        return (
            self
            if all(moved[name] is tensors[name] for name in tensors)
            else type(self)(self.shape, **moved)
        )

    @abstractmethod
    def dot(self, queries: "Form", memo: Memo | None = None) -> Tensor:
        """Inner products with the queries' gradients: (N, Q). `memo`: products of tensors that
        several parameters share.
        """

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """G v for the columns of (D, K): (N, K)."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """G^T w for the columns of (N, K), weighted sums of the gradients: (D, K)."""

    def add_to(self, sums: Tensor, weights: Tensor) -> None:
        """sums (K, D) += w^T G for (N, K) weights."""
        sums += self.rmatvec(weights).T

    def positions(self) -> "Iterator[Positions] | None":
        """The outer products whose sum over all examples is the sum of the gradients as matrices.
        None: the form does not know them.
        """
        return None

    @abstractmethod
    def sqnorm(self) -> Tensor:
        """Squared norm of each example's gradient: (N,), float64 wherever the device has it."""

    def magnitude(self) -> Tensor:
        """(N,) float64: the largest number of each gradient, or the largest that its summands
        allow, up to their count. 0 only for a gradient of zeros; not finite where a number is not.
        """
        return largest(self.dense().values)

    def as_queries(self) -> "Form":
        """The form that multiplies with the fewest operations, for use as queries."""
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    @property
    def dtype(self) -> torch.dtype:
        return next(value.dtype for value in self.tensors().values() if value.is_floating_point())

    @property
    def nbytes(self) -> int:
        return sum(value.numel() * value.element_size() for value in self.tensors().values())


@dataclass(frozen=True)
class Dense(Form):
    kind = "dense"
    values: Tensor  # (N, D)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> "Dense":
        return self

    def take(self, index: Tensor) -> "Form":
        return type(self)(self.shape, self.values[index])

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        if not isinstance(queries, Dense):  # other forms multiply with a matrix more cheaply
            return queries.matvec(self.values.T).T
        return products(self.values, queries.dense().values, memo)

    def matvec(self, vectors: Tensor) -> Tensor:
        return products(self.values, vectors.T)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.values.T @ weights

    def add_to(self, sums: Tensor, weights: Tensor) -> None:
        sums.addmm_(weights.T, self.values)

    def sqnorm(self) -> Tensor:
        return squares(self.values)


@dataclass(frozen=True)
class Projected(Dense):
    """K numbers per example, whose inner products are those of the gradients in expectation."""

    kind = "projected"

    def dense(self) -> "Dense":
        return self


@dataclass(frozen=True)
class Factors(Form):
    """Sums of S outer products: G = sum over s of left_s (o numbers) x right_s (i numbers)."""

    kind = "factors"
    left: Tensor  # (N, S, o)
    right: Tensor  # (N, S, i)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def __len__(self) -> int:
        return len(self.left)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """N, S, o, i."""
        return (*self.left.shape, self.right.shape[2])

    @property
    def dense_is_cheaper(self) -> bool:
        """Whether norms cost less from dense gradients (S o i) than from Gram matrices over the
        positions (S^2 (o + i)).
        """
        _, S, o, i = self.sizes
        return S * (o + i) >= o * i

    def dense(self) -> "Dense":
        N, S, o, _ = self.sizes
        if S == 1:
            return Dense(self.shape, (self.left.view(N, o, 1) * self.right).flatten(1))
        return Dense(self.shape, torch.bmm(self.left.transpose(1, 2), self.right).flatten(1))

    def take(self, index: Tensor) -> "Form":
        return Factors(self.shape, self.left[index], self.right[index])

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """All parts use the same buffer."""
        N, _, o, i = self.sizes
        step = max(1, PART_BYTES // (o * i * self.left.element_size()))
        buffer = self.left.new_empty(min(step, N), o, i)
        for first in range(0, N, step):
            at = slice(first, min(first + step, N))
            part = torch.bmm(
                self.left[at].transpose(1, 2), self.right[at], out=buffer[: at.stop - first]
            )
            yield at, part.view(len(part), -1)

    def as_queries(self) -> Form:
        """A pair of S positions each costs S^2 (o + i) from factors, and o i from dense
        gradients.
        """
        _, S, o, i = self.sizes
        return self.dense() if S * S * (o + i) >= o * i else self

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        if isinstance(queries, Factors):
            (N, S, o, i), (Q, R) = self.sizes, queries.left.shape[:2]
            if S * R * (o + i) < o * i:
                lefts = products(
                    self.left.flatten(0, 1), queries.left.flatten(0, 1), memo
                )  # (N*S, Q*R)
                both = products(self.right.flatten(0, 1), queries.right.flatten(0, 1)).mul_(lefts)
                return both if S == R == 1 else both.view(N, S, Q, R).sum((1, 3))
        return (
            self.matvec(queries.dense().values.T)
            if isinstance(queries, Dense | Factors)
            else queries.dot(self).T
        )

    def matvec(self, vectors: Tensor) -> Tensor:
        (N, S, o, i), K = self.sizes, vectors.shape[1]
        out = self.left.new_empty(N, K)
        if S * K <= S + K:  # left^T (V right) for each position, else the gradients first
            for k in range(K):
                turned = products(self.right.flatten(0, 1), vectors[:, k].view(o, i))
                out[:, k] = (self.left * turned.view(N, S, o)).sum((1, 2))
            return out
        if o * i * self.left.element_size() >= SLICED_BYTES:
            return self._products_in_slices(vectors.T)
        for at, part in self.parts():
            out[at] = products(part, vectors.T)
        return out

    def _products_in_slices(self, queries: Tensor) -> Tensor:
        """(N, K) with the rows of (K, o i): some rows of the gradients at a time, and the sum."""
        _, _, o, i = self.sizes
        size = self.left.element_size()
        step = max(1, SLICE_BYTES // (LEAST_ROWS * i * size))
        out = []
        for left, right in zip(self.left.split(step), self.right.split(step), strict=True):
            rows = max(1, min(o, MOST_ROWS, SLICE_BYTES // (len(left) * i * size)))
            buffer, sums = self.left.new_empty(len(left) * rows * i), None
            for first in range(0, o, rows):
                last = min(first + rows, o)
                part = buffer[: len(left) * (last - first) * i].view(len(left), last - first, i)
                torch.bmm(left[:, :, first:last].transpose(1, 2), right, out=part)
                some = products(part.view(len(left), -1), queries[:, first * i : last * i])
                sums = some if sums is None else sums.add_(some)
            assert sums is not None
            out.append(sums)
        return torch.cat(out) if out else self.left.new_empty(0, len(queries))

    def rmatvec(self, weights: Tensor) -> Tensor:
        right = self.right.flatten(0, 1)
        columns = [
            ((self.left * w.view(-1, 1, 1)).flatten(0, 1).T @ right).flatten() for w in weights.T
        ]
        return torch.stack(columns, dim=1)

    def positions(self) -> Iterator[Positions]:
        yield slice(0, self.left.shape[2]), self.left.flatten(0, 1), self.right.flatten(0, 1)

    def magnitude(self) -> Tensor:
        return (largest(self.left) * largest(self.right)).sum(1)

    def sqnorm(self) -> Tensor:
        if self.left.dtype in HALVES:
            return self.to(self.device, torch.float32).sqnorm()
        if self.left.shape[1] == 1:
            return squares(self.left.flatten(1)) * squares(self.right.flatten(1))
        if self.dense_is_cheaper:
            return torch.cat([squares(part) for _, part in self.parts()])
        lefts, rights = (torch.bmm(part, part.transpose(1, 2)) for part in (self.left, self.right))
        traces = [
            grams.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) for grams in (lefts, rights)
        ]
        square_sums = lefts.mul_(rights).sum(2).sum(1, dtype=torch.float64)
        if self.left.dtype == torch.float32:
            # again in float64 where float32 under- or overflows, or positions cancel
            sound = square_sums > 1e-6 * traces[0] * traces[1]
            for value in (square_sums, *traces):
                sound &= in_range(value, torch.float32)
            if not sound.all():
                square_sums[~sound] = (
                    self.take(~sound).to(self.device, torch.float64).sqnorm().clamp_min(0)
                )
        return square_sums
