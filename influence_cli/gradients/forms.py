"""The forms of per-example gradients: dense, factors, rows, projected. One linear-operator interface, exact conversions between them.

Seen as a matrix of N rows and D columns, each form gives products with other gradients (`dot`), with vectors (`matvec`), of its transpose
with vectors (`rmatvec`), and squared norms of its rows. What is cheapest is counted, not tried: disk by bytes, products by multiplications.

N examples, Q queries, D numbers of a parameter (of shape o x i, or V x d for rows), S positions, T stored rows, K vectors or projected
numbers.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

PART_BYTES = 16 << 20  # dense gradients made from factors at once
PAIRS = 128  # pairs of a token's rows from which a product of its own is faster


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

    def part(self, at: slice) -> "Form":
        """A stretch of the examples, as a view of the same memory."""
        return from_tensors(self.kind, self.shape, {name: value[at] for name, value in self.tensors().items()})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> "Form":
        mine = self.tensors()
        moved = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in mine.items()}
        return self if all(moved[name] is mine[name] for name in mine) else from_tensors(self.kind, self.shape, moved)

    @abstractmethod
    def dot(self, queries: "Form", memo: "Memo | None" = None) -> Tensor:
        """Inner products with the queries' gradients: (N, Q). `memo` shares those of tensors that several parameters have in common."""

    @abstractmethod
    def matvec(self, vectors: Tensor) -> Tensor:
        """G v for the columns of (D, K): (N, K)."""

    @abstractmethod
    def rmatvec(self, weights: Tensor) -> Tensor:
        """G^T w for the columns of (N, K), a weighted sum of the gradients: (D, K)."""

    @abstractmethod
    def sqnorm(self) -> Tensor:
        """Squared norm of each example's gradient: (N,), float64 wherever the device has it."""

    def ready(self) -> "Form":
        """The form in which these gradients, as queries, are multiplied with fewest operations."""
        return self

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

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

    def dot(self, queries: Form, memo: "Memo | None" = None) -> Tensor:
        if isinstance(queries, Rows | Postings | Factors):
            return queries.matvec(self.values.T).T
        return products(self.values, queries.dense().values, memo)

    def matvec(self, vectors: Tensor) -> Tensor:
        return products(self.values, vectors.T)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.values.T @ weights

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

    def dense(self) -> "Dense":
        N, S, o, _ = self.sizes
        if S == 1:
            return Dense(self.shape, (self.left.view(N, o, 1) * self.right).flatten(1))
        return Dense(self.shape, torch.bmm(self.left.transpose(1, 2), self.right).flatten(1))

    def take(self, index: Tensor) -> "Form":
        return Factors(self.shape, self.left[index], self.right[index])

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Some of the examples at a time as dense matrices, in one reused buffer."""
        N, _, o, i = self.sizes
        step = max(1, PART_BYTES // (o * i * self.left.element_size()))
        buffer = self.left.new_empty(min(step, N), o, i)
        for first in range(0, N, step):
            at = slice(first, min(first + step, N))
            part = torch.bmm(self.left[at].transpose(1, 2), self.right[at], out=buffer[: at.stop - first])
            yield at, part.view(len(part), -1)

    def ready(self) -> Form:
        """Over S positions each, a pair costs S^2 (o + i) from factors and o i from dense gradients."""
        _, S, o, i = self.sizes
        return self.dense() if S * S * (o + i) >= o * i else self

    def dot(self, queries: Form, memo: "Memo | None" = None) -> Tensor:
        if isinstance(queries, Factors):
            (N, S, o, i), (Q, R) = self.sizes, queries.left.shape[:2]
            if S * R * (o + i) < o * i:
                lefts = products(self.left.flatten(0, 1), queries.left.flatten(0, 1), memo)  # (N*S, Q*R)
                both = products(self.right.flatten(0, 1), queries.right.flatten(0, 1)).mul_(lefts)
                return both if S == R == 1 else both.view(N, S, Q, R).sum((1, 3))
        return queries.dot(self).T if isinstance(queries, Rows | Postings) else self.matvec(queries.dense().values.T)

    def matvec(self, vectors: Tensor) -> Tensor:
        (N, S, o, i), K = self.sizes, vectors.shape[1]
        out = self.left.new_empty(N, K)
        if S * K <= S + K:  # left^T (V right) for each position, else the gradients first
            for k in range(K):
                turned = self.right @ vectors[:, k].view(o, i).T
                out[:, k] = (self.left * turned).sum((1, 2))
            return out
        for at, part in self.parts():
            out[at] = products(part, vectors.T)
        return out

    def rmatvec(self, weights: Tensor) -> Tensor:
        right = self.right.flatten(0, 1)
        columns = [((self.left * w.view(-1, 1, 1)).flatten(0, 1).T @ right).flatten() for w in weights.T]
        return torch.stack(columns, dim=1)

    def sqnorm(self) -> Tensor:
        _, S, o, i = self.sizes
        if self.left.dtype in HALVES:
            return self.to(self.device, torch.float32).sqnorm()
        if S == 1:
            return squares(self.left.flatten(1)) * squares(self.right.flatten(1))
        if S * (o + i) >= o * i:
            return torch.cat([squares(part) for _, part in self.parts()])
        lefts, rights = (torch.bmm(part, part.transpose(1, 2)) for part in (self.left, self.right))
        found = (lefts * rights).sum((1, 2), dtype=torch.float64)
        if self.left.dtype == torch.float32:  # where that under- or overflows, or positions cancel, once more in float64
            traces = [grams.diagonal(dim1=1, dim2=2).sum(1, dtype=torch.float64) for grams in (lefts, rights)]
            sound = found > 1e-6 * traces[0] * traces[1]
            for value in (found, *traces):
                sound &= in_range(value, torch.float32)
            if not sound.all():
                found[~sound] = self.take(~sound).to(self.device, torch.float64).sqnorm().clamp_min(0)
        return found


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

    def part(self, at: slice) -> "Form":
        offsets = self.offsets[at.start : at.stop + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        return Rows(self.shape, self.ids[rows], self.values[rows], offsets - offsets[0])

    def take(self, index: Tensor) -> "Form":
        counts = self.offsets.diff()[index]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=self.ids.device) - torch.repeat_interleave(offsets[:-1], counts)
        place = torch.repeat_interleave(self.offsets[:-1][index], counts) + within
        return Rows(self.shape, self.ids[place], self.values[place], offsets)

    def dot(self, queries: Form, memo: "Memo | None" = None) -> Tensor:
        """Only rows of one token meet."""
        if isinstance(queries, Rows | Postings):
            return Postings.of(self).dot(queries.ready(), memo)
        return self.matvec(queries.dense().values.T)

    def ready(self) -> Form:
        return Postings.of(self)

    def matvec(self, vectors: Tensor) -> Tensor:
        K = vectors.shape[1]
        out = self.values.new_zeros(len(self), K)
        for k in range(K):  # one at a time: T x d numbers, whatever K
            products = (self.values * vectors[:, k].reshape(self.shape[0], -1)[self.ids]).sum(1)
            out[:, k].index_add_(0, self.example, products)
        return out

    def rmatvec(self, weights: Tensor) -> Tensor:
        rows = self.values.new_zeros(weights.shape[1], self.shape[0], self.values.shape[1])
        for out, w in zip(rows, weights.T, strict=True):
            out.index_add_(0, self.ids, self.values * w[self.example, None])
        return rows.flatten(1).T

    def sqnorm(self) -> Tensor:
        return squares(self.values).new_zeros(len(self)).index_add_(0, self.example, squares(self.values))


@dataclass(frozen=True)
class Postings(Form):
    """Rows in the order of their tokens, an inverted index: token `tokens[u]` has the rows `starts[u]:starts[u+1]`, by rising example.

    The form in which word embeddings are kept: what two texts have in common is found by token, and one token's rows lie together.
    """

    kind = "postings"
    tokens: Tensor  # (U,) int64, rising
    starts: Tensor  # (U+1,) int64
    example: Tensor  # (T,) int64
    values: Tensor  # (T, d)
    counts: Tensor  # (N,) int64: rows of each example

    @classmethod
    def of(cls, rows: Rows) -> "Postings":
        order = torch.argsort(rows.ids, stable=True)
        tokens, counts = torch.unique_consecutive(rows.ids[order], return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(rows.shape, tokens, starts, rows.example[order], rows.values[order], rows.offsets.diff())

    def rows(self) -> Rows:
        order = torch.argsort(self.example, stable=True)  # by example, then by token
        ids = torch.repeat_interleave(self.tokens, self.starts.diff())[order]
        return Rows(self.shape, ids, self.values[order], torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)]))

    def tensors(self) -> dict[str, Tensor]:
        names = ("tokens", "starts", "example", "values", "counts")
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        return len(self.counts)

    def dense(self) -> "Dense":
        return self.rows().dense()

    def part(self, at: slice) -> "Form":
        return Postings.of(self.rows().part(at))  # type: ignore[arg-type]

    def take(self, index: Tensor) -> "Form":
        return Postings.of(self.rows().take(index))  # type: ignore[arg-type]

    def dot(self, queries: Form, memo: "Memo | None" = None) -> Tensor:
        """Cost d for each pair of rows of one token: a product for each token that many of both have, the others pair by pair."""
        if isinstance(queries, Rows):
            queries = Postings.of(queries)
        if not isinstance(queries, Postings):
            return self.rows().dot(queries, memo)
        out = self.values.new_zeros(len(self), Q := len(queries))
        if not len(self.tokens):
            return out
        place = torch.searchsorted(self.tokens, queries.tokens).clamp(max=len(self.tokens) - 1)
        theirs = (self.tokens[place] == queries.tokens).nonzero().flatten()  # of the tokens that both have
        ours = place[theirs]
        meeting = torch.stack(
            [self.starts[:-1][ours], self.starts.diff()[ours], queries.starts[:-1][theirs], queries.starts.diff()[theirs]]
        )
        often = meeting[1] * meeting[3] > PAIRS
        for a, n, b, m in meeting[:, often].T.tolist():
            at = self.example[a : a + n, None] * Q + queries.example[b : b + m]
            out.view(-1).index_add_(0, at.flatten(), products(queries.values[b : b + m], self.values[a : a + n]).T.flatten())
        for mine, yours in pairs(meeting[:, ~often], max(1, PART_BYTES // (2 * self.values[:1].nbytes))):
            at = self.example[mine] * Q + queries.example[yours]
            out.view(-1).index_add_(0, at, (self.values[mine] * queries.values[yours]).sum(1))
        return out

    def select(self, kept: Tensor) -> "Postings":
        """Only the rows of a (T,) mask."""
        if bool(kept.all()):
            return self
        token = torch.repeat_interleave(torch.arange(len(self.tokens), device=kept.device), self.starts.diff())
        counts = torch.bincount(token[kept], minlength=len(self.tokens))
        there = counts > 0
        starts = torch.cat([counts.new_zeros(1), counts[there].cumsum(0)])
        example = self.example[kept]
        return Postings(self.shape, self.tokens[there], starts, example, self.values[kept], torch.bincount(example, minlength=len(self)))

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.rows().matvec(vectors)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.rows().rmatvec(weights)

    def sqnorm(self) -> Tensor:
        norms = squares(self.values)
        return norms.new_zeros(len(self)).index_add_(0, self.example, norms)


def pairs(meeting: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each column (a, n, b, m) all pairs (a + i, b + j) with i < n and j < m; at most `most` at once."""
    (ours, _, theirs, columns), counts = meeting, meeting[1] * meeting[3]
    entry = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    within = torch.arange(len(entry), device=counts.device) - (counts.cumsum(0) - counts)[entry]
    first, second = ours[entry] + within // columns[entry], theirs[entry] + within % columns[entry]
    yield from zip(first.split(most), second.split(most), strict=True) if len(entry) else ()


FORMS: dict[str, type[Form]] = {form.kind: form for form in (Dense, Factors, Rows, Postings, Projected)}


def from_tensors(kind: str, shape: Sequence[int], tensors: dict[str, Tensor]) -> Form:
    return FORMS[kind](tuple(shape), **tensors)


Memo = dict[tuple[Any, ...], tuple[Tensor, StorageWeakRef, StorageWeakRef]]  # products taken, by where their factors lie, while they do

HALVES = (torch.float16, torch.bfloat16)

# oneDNN's float32 product, 1.3 times as fast as MKL's on the AMD processor of the benchmarks, and the same bits wherever its factors lie in
# memory, which MKL's are not; torch offers it to its own compiler only
FAST = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def products(ours: Tensor, theirs: Tensor, memo: Memo | None = None) -> Tensor:
    """(N, Q) inner products of the rows of (N, K) and (Q, K). `memo`: of the same tensors they are taken once."""
    key = tuple((value.data_ptr(), value.shape, value.stride()) for value in (ours, theirs))
    if memo is not None and key in memo and not any(storage.expired() for storage in memo[key][1:]):
        return memo[key][0]
    found = FAST(theirs, ours, None, "none", [], "").T if FAST and ours.is_cpu and ours.dtype == torch.float32 else ours @ theirs.T
    if memo is not None:
        memo[key] = found, StorageWeakRef(ours.untyped_storage()), StorageWeakRef(theirs.untyped_storage())
    return found


def squares(values: Tensor) -> Tensor:
    """Sum of squares of each row of an (N, D) tensor, float64: stretches of 1,024 in the tensor's precision, their sum in float64.

    Rows that would under- or overflow so are taken in float64 throughout.
    """
    if values.dtype in HALVES:
        values = values.float()
    size, width = values.shape
    whole = width // 1024 * 1024 if width > 2048 else 0
    norms = torch.linalg.vector_norm(values[:, whole:], dim=1)
    found = norms.double().square()
    if whole:
        stretches = torch.linalg.vector_norm(values[:, :whole].view(size, -1, 1024), dim=2)
        found += stretches.double().square().sum(1)
    if values.dtype != torch.float64:
        odd = ~in_range(found, values.dtype)
        if odd.any():
            found[odd] = values[odd].double().square().sum(1)
    return found


def in_range(sums: Tensor, dtype: torch.dtype) -> Tensor:
    """Which sums of squares are surely of terms that a precision can hold, but for 1e-8 of the sum."""
    limits = torch.finfo(dtype)
    return (sums > limits.tiny * 1e8) & (sums < limits.max)


def cheapest(form: Form) -> Form:
    """The same gradients in the exact form of fewer bytes, of those it can become: factors S (o + i), dense o i."""
    if isinstance(form, Factors):
        _, S, o, i = form.sizes
        return form if S * (o + i) < o * i else form.dense()
    return form


def merged(first: Form, second: Form) -> Form:
    """The sum of two forms of the same examples: a parameter that is used twice has one gradient."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        pairs = zip(first.tensors().values(), second.tensors().values(), strict=True)
        return Factors(first.shape, *(torch.cat(pair, dim=1) for pair in pairs))
    if isinstance(first, Rows) and isinstance(second, Rows):
        tokens, size = first.shape[0], len(first)
        keys = torch.cat([part.example * tokens + part.ids for part in (first, second)])
        distinct, place = torch.unique(keys, return_inverse=True)  # rising: by example, then by id
        values = first.values.new_zeros(len(distinct), first.values.shape[1])
        values.index_add_(0, place, torch.cat([first.values, second.values]))
        counts = torch.bincount(distinct // tokens, minlength=size)
        return Rows(first.shape, distinct % tokens, values, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    if isinstance(first, Rows):
        first, second = second, first
    values = first.values.clone() if isinstance(first, Dense) else first.dense().values
    if isinstance(second, Rows):  # an example's ids are distinct
        values.view(len(second), second.shape[0], -1)[second.example, second.ids] += second.values
    else:
        values += second.dense().values
    return Dense(first.shape, values)


def distance(first: Form, second: Form) -> Tensor:
    """(N,) float64: the norm of the difference of two gradients of each example."""
    pair = [form.rows() if isinstance(form, Postings) else form for form in (first, second)]
    if all(isinstance(form, Rows) for form in pair):
        ours, theirs = (dataclasses.replace(form, values=form.values.double()) for form in pair if isinstance(form, Rows))
        return merged(ours, dataclasses.replace(theirs, values=-theirs.values)).sqnorm().sqrt()
    return (first.dense().values.double() - second.dense().values.double()).norm(dim=1)


def concat(forms: Sequence[Form]) -> Form:
    """The examples of several forms of one parameter, one after the other; dense where the kinds differ."""
    if len(forms) == 1:
        return forms[0]
    if all(isinstance(form, Postings) for form in forms):
        return Postings.of(concat([form.rows() for form in forms]))  # type: ignore[attr-defined,arg-type]
    if len({form.kind for form in forms}) > 1:
        forms = [form.dense() for form in forms]
    first = forms[0]
    if isinstance(first, Rows):
        counts = torch.cat([form.tensors()["offsets"].diff() for form in forms])
        merged_rows = {name: torch.cat([form.tensors()[name] for form in forms]) for name in ("ids", "values")}
        return Rows(first.shape, **merged_rows, offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
    if isinstance(first, Factors):
        longest = max(form.tensors()["left"].shape[1] for form in forms)
        forms = [padded(form, longest) for form in forms if isinstance(form, Factors)]
    return from_tensors(first.kind, first.shape, {name: torch.cat([form.tensors()[name] for form in forms]) for name in first.tensors()})


def padded(form: Factors, positions: int) -> Factors:
    """Factors of more positions, the added ones zero."""
    more = positions - form.left.shape[1]
    if not more:
        return form
    return Factors(form.shape, *(torch.nn.functional.pad(value, (0, 0, 0, more)) for value in (form.left, form.right)))


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
