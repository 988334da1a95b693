"""Random projections of per-example gradients: K numbers a parameter, whose inner products are
those of the gradients in expectation.

A parameter of shape (o, ...) is seen as a matrix of o rows and i columns; its gradient is a sum
over positions of outer products left (o) x right (i). Each kind is a linear map P with E[P^T P] =
1, and (but for `sparse`) takes the two sides apart, so that no o x i numbers are formed. The sides'
random numbers are independent, seeded from (seed, parameter, side): parameters of one shape have
different maps.

tensor-sketch  Pham & Pagh 2013: count sketches of both sides, multiplied as polynomials modulo x^K
- 1 sparse         a count sketch of the gradient itself khatri-rao     coordinate j = q_j^T G p_j /
sqrt(K), signs q and p kronecker      A G B^T with Gaussian A (k x o) and B (k x i), K = k^2: for
parity with the papers, its error is far larger

Hashes are even: they collide less often than independent ones, and not at all where a side has at
most K numbers. Parameters of at most K numbers are kept exactly. N examples, S positions, T rows of
an embedding, F columns of a table.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from influence_cli.gradients.deferred_forms import TiedForm
from influence_cli.gradients.forms import (
    HALVES,
    PART_BYTES,
    Factors,
    Form,
    Projected,
    products,
    squares,
)
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings

# adding a number to its place costs about as much as this many numbers and doublings of a Fourier
# transform
ADDING = 7
Measured = tuple[
    Tensor, Form
]  # squared norms (N,) of the gradients themselves, and their projection


@dataclass(frozen=True)
class Projection:
    """`--project numbers --projection kind --seed seed`. The same maps for every checkpoint, split
    and device.
    """

    kind: str
    numbers: int
    seed: int = 0
    _maps: "dict[tuple[str, torch.device, torch.dtype], Map]" = field(
        default_factory=dict, compare=False, repr=False
    )

    @property
    def key(self) -> str:
        """Its part of a cache folder's name."""
        return f"{self.kind}-{self.numbers}-seed-{self.seed}"

    def width(self, shape: Sequence[int]) -> int:
        """Numbers kept of one example's gradient."""
        return min(self.numbers, math.prod(shape))

    def spread(self, shape: Sequence[int]) -> float:
        """The most that the standard deviation of an inner product can be, in units of both norms:
        met by gradients of rank one (tensor sketches: (3^p - 1) / K at p = 2, Pham & Pagh 2013).
        """
        if math.prod(shape) <= self.numbers:
            return 0.0
        root = math.sqrt(self.numbers)
        variance = {
            "tensor-sketch": 8 / self.numbers,
            "sparse": 2 / self.numbers,
            "khatri-rao": 9 / self.numbers,
        }
        return math.sqrt(variance.get(self.kind, (1 + 2 / root) ** 2 - 1))

    def __call__(self, name: str, form: Form) -> Measured:
        """Exact squared norms and the projected gradients of one parameter."""
        if math.prod(form.shape) <= self.numbers:
            exact = form.dense()
            return exact.sqnorm(), Projected(form.shape, exact.values)
        form = form.to(form.device, torch.float32) if form.dtype in HALVES else form
        key = name, form.device, form.dtype
        if key not in self._maps:
            tables = Tables(self.seed, name, *matrix(form.shape), *key[1:])
            self._maps[key] = KINDS[self.kind](tables, self.numbers)
        norms, values = self._maps[key].project(form)
        return norms, Projected(form.shape, values)


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter seen as a matrix, the sides of its factors; a vector is one
    row.
    """
    if len(shape) == 2:
        return shape[0], shape[1]
    wide = [n for n in shape if n != 1] or [1]
    return (wide[0], math.prod(wide[1:])) if len(wide) > 1 else (1, wide[0])


@dataclass(frozen=True)
class Tables:
    """Random numbers of one parameter of `rows` x `columns`, the same on every machine and in every
    version of numpy and torch: they are made from the bits of PCG64 alone.
    """

    seed: int
    name: str
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype

    def bits(self, side: str, count: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{side}".encode()).digest()
        return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)

    def signs(self, side: str, *shape: int) -> Tensor:
        """+1 and -1."""
        bits = self.bits(f"{side} signs", math.prod(shape)) >> 63
        return self.placed(1.0 - 2.0 * bits.astype(np.float64).reshape(shape))

    def normal(self, side: str, *shape: int) -> Tensor:
        """Of mean 0 and variance 1 (Box and Muller 1958)."""
        uniform = (self.bits(f"{side} normal", 2 * math.prod(shape)) >> 11) / 2.0**53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[::2])), 2 * np.pi * uniform[1::2]
        return self.placed((radius * np.cos(angle)).reshape(shape))

    def order(self, side: str, count: int) -> np.ndarray:
        """A random order of 0..count."""
        return np.argsort(self.bits(f"{side} order", count), kind="stable")

    def placed(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype).to(self.device)


class Map(ABC):
    """The projection of one parameter."""

    @abstractmethod
    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        """(N,) exact squared norms and (N, K) projected gradients."""


class Sided(Map):
    """Kinds that take the two sides apart, by a table for each: `left` (o, F) and `right` (F',
    i).
    """

    left: Tensor
    right: Tensor

    @abstractmethod
    def meet(self, left: Tensor, right: Tensor) -> Tensor:
        """(N, S, F) and (N, S, F') -> (N, .), summed over the positions."""

    def meet_rows(self, left: Tensor, right: Tensor) -> Tensor:
        """(T, F) and (T, F') -> (T, .), each row by itself."""
        return self.meet(left.unsqueeze(1), right.unsqueeze(1))

    def finish(self, sums: Tensor) -> Tensor:
        """What `meet` gives, summed over all, as (N, K)."""
        return sums

    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        if isinstance(form, TiedForm):
            return form.sqnorm(), self.finish(self.factors(form.factors) + self.rows(form.rows))
        if isinstance(form, EmbeddingRows | Postings):
            return form.sqnorm(), self.finish(
                self.rows(form.rows() if isinstance(form, Postings) else form)
            )
        if isinstance(form, Factors) and not form.dense_is_cheaper:
            return form.sqnorm(), self.finish(self.factors(form))
        norms, sums = zip(
            *((squares(part), self.dense(part)) for _, part in form.parts()), strict=True
        )
        return torch.cat(norms), self.finish(torch.cat(sums))

    def factors(self, form: Factors) -> Tensor:
        """Cost S (o F + i F') for each example."""
        N, S, o, i = form.sizes
        step = max(
            1,
            PART_BYTES
            // (2 * S * (self.left.shape[1] + len(self.right)) * form.left.element_size()),
        )
        left, right = form.left.reshape(-1, o), form.right.reshape(-1, i)
        sums = []
        for first in range(0, N, step):
            at = slice(first * S, min(first + step, N) * S)
            left_sketch, right_sketch = (
                products(left[at], self.left.T),
                products(right[at], self.right),
            )
            sums.append(
                self.meet(
                    left_sketch.view(-1, S, left_sketch.shape[1]),
                    right_sketch.view(-1, S, right_sketch.shape[1]),
                )
            )
        return torch.cat(sums)

    def dense(self, part: Tensor) -> Tensor:
        """Of (n, o i) gradients, whose rows are positions: cost o i F' for each example."""
        n, (o, i) = len(part), (len(self.left), self.right.shape[1])
        right_side = products(part.reshape(n * o, i), self.right).view(n, o, -1)
        return self.meet(self.left.expand(n, *self.left.shape), right_side)

    def rows(self, form: EmbeddingRows) -> Tensor:
        """Of an embedding's rows: the left side is a token."""
        step = max(1, PART_BYTES // (2 * self.width * form.values.element_size()))
        out = form.values.new_zeros(len(form), self.width)
        for first in range(0, len(form.ids), step):
            at = slice(first, first + step)
            met = self.meet_rows(self.left[form.ids[at]], products(form.values[at], self.right))
            out.index_add_(0, form.example[at], met)
        return out

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers of a row of what `meet` gives."""


class TensorSketch(Map):
    """Both sides are folded to at most K numbers, and multiplied in the frequency domain. Where
    positions are many and K is large, the products of their numbers, summed over the positions, are
    a matrix instead, whose entries with places p and q are added to number p + q modulo K.
    """

    def __init__(self, tables: Tables, numbers: int) -> None:
        self.numbers = numbers
        self.left, self.right = (
            Fold(tables, side, n, numbers)
            for side, n in (("left", tables.rows), ("right", tables.columns))
        )

    @cached_property
    def sums(self) -> "Sums":
        """Of the products of all pairs: K^2 places, made where they are asked for."""
        places = (self.left.after[:, None] + self.right.after) % self.numbers
        return Sums(
            (places + self.numbers * (self.left.minus[:, None] ^ self.right.minus)).flatten(),
            self.numbers,
        )

    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        if isinstance(form, TiedForm):
            return form.sqnorm(), self.factors(form.factors) + self.rows(form.rows)
        if isinstance(form, EmbeddingRows | Postings):
            return form.sqnorm(), self.rows(form.rows() if isinstance(form, Postings) else form)
        if isinstance(form, Factors) and not form.dense_is_cheaper:
            return form.sqnorm(), self.factors(form)
        norms, values = zip(
            *((squares(part), self.dense(part)) for _, part in form.parts()), strict=True
        )
        return torch.cat(norms), torch.cat(values)

    def factors(self, form: Factors) -> Tensor:
        """Cost S (o + i) and the smaller of K^2 and S K log K for each example."""
        N, S, o, i = form.sizes
        entries, sketch_cost = self.left.width * self.right.width, S * self.numbers
        by_matrix = ADDING * entries <= sketch_cost * math.log2(2 * self.numbers)
        step = max(
            1,
            PART_BYTES
            // (
                (S * (o + i) + (entries if by_matrix else 4 * sketch_cost))
                * form.left.element_size()
            ),
        )
        parts = []
        for first in range(0, N, step):
            at = slice(first, first + step)
            left, right = (
                self.left(form.left[at].reshape(-1, o)),
                self.right(form.right[at].reshape(-1, i)),
            )
            if by_matrix:
                left, right = left.view(-1, S, self.left.width), right.view(-1, S, self.right.width)
                parts.append(self.sums(torch.bmm(left.transpose(1, 2), right).flatten(1)))
            else:
                met = torch.fft.rfft(self.left.placed(left)).mul_(
                    torch.fft.rfft(self.right.placed(right))
                )
                parts.append(torch.fft.irfft(met.view(-1, S, met.shape[1]).sum(1), self.numbers))
        return torch.cat(parts)

    def dense(self, part: Tensor) -> Tensor:
        """Of (n, o i) gradients: cost o i for each."""
        columns = self.right(part.view(-1, self.right.count))
        return self.sums(
            self.left(columns.view(len(part), self.left.count, self.right.width)).flatten(1)
        )

    def rows(self, form: EmbeddingRows) -> Tensor:
        """Of an embedding's rows: each is turned by the place of its token."""
        out = form.values.new_zeros(len(form), self.numbers)
        steps = torch.arange(self.numbers, device=form.device)
        step = max(1, PART_BYTES // (8 * self.numbers))
        for first in range(0, len(form.ids), step):
            at = slice(first, first + step)
            ids = form.ids[at]
            placed = self.right.placed(self.right(form.values[at])) * self.left.signs[ids, None]
            out.index_add_(
                0,
                form.example[at],
                placed.gather(1, (steps - self.left.places[ids, None]) % self.numbers),
            )
        return out


class Sums:
    """Adds numbers to K places, (n, count, ...) -> (n, K, ...): place p as it is, place K + p with
    its sign turned.
    """

    def __init__(self, places: Tensor, numbers: int) -> None:
        self.places, self.numbers = places, numbers

    def __call__(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), 2 * self.numbers, *values.shape[2:]).index_add_(
            1, self.places, values
        )
        return sums[:, : self.numbers] - sums[:, self.numbers :]


class Fold:
    """A count sketch of one side, where it has more than K numbers; fewer stay as they are, and
    what they would be multiplied by and where they would stand is in `after` (their places) and
    `minus` (whether their signs are turned).
    """

    def __init__(self, tables: Tables, side: str, count: int, numbers: int) -> None:
        self.count, self.width = count, min(count, numbers)
        self.signs = tables.signs(side, count)
        self.places = torch.from_numpy(
            tables.order(side, max(count, numbers))[:count] % numbers
        ).to(tables.device)
        self.sums = Sums(self.places + numbers * (self.signs < 0), numbers)
        folds = count > numbers
        self.after = torch.arange(numbers, device=tables.device) if folds else self.places
        self.minus = torch.zeros_like(self.after, dtype=torch.bool) if folds else self.signs < 0

    def __call__(self, values: Tensor) -> Tensor:
        """(R, count) -> (R, width), or (n, count, b) -> (n, width, b)."""
        return self.sums(values) if self.count > self.width else values

    def placed(self, folded: Tensor) -> Tensor:
        """(R, width) -> (R, K): every number at its place, with its sign."""
        return folded if self.count > self.width else self.sums(folded)


class KhatriRao(Sided):
    def __init__(self, tables: Tables, numbers: int) -> None:
        self.left = tables.signs("left", tables.rows, numbers) / math.sqrt(numbers)
        self.right = tables.signs("right", numbers, tables.columns)

    @property
    def width(self) -> int:
        return self.left.shape[1]

    def meet(self, left: Tensor, right: Tensor) -> Tensor:
        return (left * right).sum(1)


class Kronecker(Sided):
    def __init__(self, tables: Tables, numbers: int) -> None:
        root = math.isqrt(numbers)
        self.left = tables.normal("left", tables.rows, root) / math.sqrt(root)
        self.right = tables.normal("right", root, tables.columns) / math.sqrt(root)

    @property
    def width(self) -> int:
        return self.left.shape[1] * len(self.right)

    def meet(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.bmm(left.transpose(1, 2), right).flatten(1)


class Sparse(Map):
    """As good as a dense Gaussian map, at the cost of forming the gradients, some examples at a
    time.
    """

    def __init__(self, tables: Tables, numbers: int) -> None:
        self.numbers, count = numbers, tables.rows * tables.columns
        self.signs = tables.signs("both", count)
        self.places = torch.from_numpy(tables.order("both", count) % numbers).to(tables.device)

    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        norms, sums = [], []
        for _, part in form.parts():
            norms.append(squares(part))
            signed = (
                part * self.signs
            ).T.contiguous()  # a gradient's numbers side by side for all examples: added row by row
            sums.append(
                signed.new_zeros(self.numbers, len(part)).index_add_(0, self.places, signed).T
            )
        return torch.cat(norms), torch.cat(sums)


KINDS: dict[str, Callable[[Tables, int], Map]] = {
    "tensor-sketch": TensorSketch,
    "sparse": Sparse,
    "khatri-rao": KhatriRao,
    "kronecker": Kronecker,
}
