"""The forms of per-example gradients: dense, factors, rows, projected. One linear-operator interface, exact conversions between them.

N examples, Q queries, D numbers of a parameter (of shape O x I, or V x d for rows), S positions, T stored rows, K projected numbers.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form(ABC):
    """The gradients of N examples for one parameter of `shape`. Subclasses say how they are held."""

    kind: ClassVar[str]
    shape: tuple[int, ...]

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name; the values among them are floating point, with one leading axis of rows."""

    @abstractmethod
    def __len__(self) -> int:
        """N."""

    @abstractmethod
    def dense(self) -> "Dense":
        """The same gradients as an N x D matrix."""

    @abstractmethod
    def take(self, index: Tensor) -> "Form":
        """The examples at these positions, in this order."""

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Form":
        moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.tensors().items()}
        return from_tensors(self.kind, self.shape, moved)

    @abstractmethod
    def dot(self, queries: "Form") -> Tensor:
        """Inner products with the queries' gradients: (N, Q)."""

    @abstractmethod
    def sqnorm(self) -> Tensor:
        """Squared norm of each example's gradient: (N,), float64 wherever the device has it."""

    def total(self) -> Tensor:
        """The sum over the examples: (1, D) float64."""
        return self.dense().values.sum(0, keepdim=True, dtype=torch.float64)

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

    def dot(self, queries: Form) -> Tensor:
        if isinstance(queries, Rows):
            return queries.dot(self).T
        return self.values @ queries.dense().values.T

    def sqnorm(self) -> Tensor:
        return squares(self.values)


@dataclass(frozen=True)
class Projected(Dense):
    """K numbers per example whose inner products are those of the gradients in expectation; not convertible back."""

    kind = "projected"

    def dense(self) -> "Dense":
        return self


@dataclass(frozen=True)
class Factors(Form):
    """Sums of S outer products: G = sum over s of left_s (O numbers) x right_s (I numbers)."""

    kind = "factors"
    left: Tensor  # (N, S, O)
    right: Tensor  # (N, S, I)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def __len__(self) -> int:
        return len(self.left)

    def dense(self) -> "Dense":
        return Dense(self.shape, torch.einsum("nso,nsi->noi", self.left, self.right).flatten(1))

    def take(self, index: Tensor) -> "Form":
        return Factors(self.shape, self.left[index], self.right[index])

    def dot(self, queries: Form) -> Tensor:
        if isinstance(queries, Factors):
            (N, S, _), (Q, R, _) = self.left.shape, queries.left.shape
            lefts = self.left.flatten(0, 1) @ queries.left.flatten(0, 1).T  # (N*S, Q*R)
            rights = self.right.flatten(0, 1) @ queries.right.flatten(0, 1).T
            return (lefts * rights).view(N, S, Q, R).sum((1, 3))
        return self.dense().dot(queries)

    def sqnorm(self) -> Tensor:
        grams = torch.einsum("nso,nto->nst", self.left, self.left) * torch.einsum("nsi,nti->nst", self.right, self.right)
        return grams.sum((1, 2), dtype=torch.float64)


@dataclass(frozen=True)
class Rows(Form):
    """Few rows of a V x d matrix: example n has the rows `ids[offsets[n]:offsets[n+1]]`, rising."""

    kind = "rows"
    ids: Tensor  # (T,) int64
    values: Tensor  # (T, d)
    offsets: Tensor  # (N+1,) int64

    def tensors(self) -> dict[str, Tensor]:
        return {"ids": self.ids, "values": self.values, "offsets": self.offsets}

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def example(self) -> Tensor:
        """(T,): which example each stored row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.ids.device), self.offsets.diff())

    def dense(self) -> "Dense":
        out = self.values.new_zeros(len(self), self.shape[0], math.prod(self.shape[1:]))
        out[self.example, self.ids] = self.values
        return Dense(self.shape, out.flatten(1))

    def take(self, index: Tensor) -> "Form":
        counts = self.offsets.diff()[index]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=self.ids.device) - torch.repeat_interleave(offsets[:-1], counts)
        place = torch.repeat_interleave(self.offsets[:-1][index], counts) + within
        return Rows(self.shape, self.ids[place], self.values[place], offsets)

    def dot(self, queries: Form) -> Tensor:
        """Per query, each stored row times the query's row of that id, summed per example: T*d multiplications."""
        out = self.values.new_zeros(len(self), len(queries))
        example = self.example
        for q in range(len(queries)):
            one = queries.take(torch.tensor([q], device=self.ids.device))
            if isinstance(one, Rows) and len(one.ids):
                place = torch.searchsorted(one.ids, self.ids).clamp(max=len(one.ids) - 1)  # ids of an example rise
                at = (one.ids[place] == self.ids).nonzero().flatten()
                products = (self.values[at] * one.values[place[at]]).sum(1)
            elif isinstance(one, Rows):
                continue
            else:
                at = torch.arange(len(self.ids), device=self.ids.device)
                products = (self.values * one.dense().values.view(self.shape[0], -1)[self.ids]).sum(1)
            out[:, q].index_add_(0, example[at], products)
        return out

    def total(self) -> Tensor:
        rows = torch.zeros(self.shape[0], self.values.shape[1], dtype=torch.float64, device=self.ids.device)
        return rows.index_add_(0, self.ids, self.values.double()).view(1, -1)

    def sqnorm(self) -> Tensor:
        return squares(self.values).new_zeros(len(self)).index_add_(0, self.example, squares(self.values))


FORMS: dict[str, type[Form]] = {form.kind: form for form in (Dense, Factors, Rows, Projected)}


def from_tensors(kind: str, shape: Sequence[int], tensors: dict[str, Tensor]) -> Form:
    return FORMS[kind](tuple(shape), **tensors)


def squares(values: Tensor) -> Tensor:
    """Sum of squares of each row of an (N, D) tensor, in float64 without a float64 copy."""
    return torch.linalg.vector_norm(values, dim=1, dtype=torch.float64).square()


def concat(forms: Sequence[Form]) -> Form:
    """The examples of several forms of one parameter, one after the other; dense where the kinds differ."""
    if len(forms) == 1:
        return forms[0]
    if len({form.kind for form in forms}) > 1:
        forms = [form.dense() for form in forms]
    first = forms[0]
    if isinstance(first, Rows):
        counts = torch.cat([form.tensors()["offsets"].diff() for form in forms])
        merged = {name: torch.cat([form.tensors()[name] for form in forms]) for name in ("ids", "values")}
        return Rows(first.shape, **merged, offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    return from_tensors(first.kind, first.shape, {name: torch.cat([form.tensors()[name] for form in forms]) for name in first.tensors()})


def smallest(gradients: Tensor, embedding: bool) -> Form:
    """(B, *shape) gradients in the exact form of fewer bytes: rows where most rows of an embedding are zero, else dense."""
    shape = tuple(gradients.shape[1:])
    if embedding and len(shape) == 2:
        used = (gradients != 0).any(2)  # (B, V)
        counts = used.sum(1)
        stored = int(counts.sum())
        row_bytes = shape[1] * gradients.element_size() + 8
        if stored * row_bytes + 8 * len(counts) < gradients.numel() * gradients.element_size():
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            return Rows(shape, used.nonzero()[:, 1].contiguous(), gradients[used], offsets)
    return Dense(shape, gradients.reshape(len(gradients), -1))
