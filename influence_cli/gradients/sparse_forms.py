"""The forms of an embedding's gradients: few rows of a V x d matrix, by example or by token.

Letters: N examples, Q queries, T stored rows, U distinct tokens, V x d the embedding, K vectors.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import PART_BYTES, Dense, Form
from influence_cli.gradients.row_products import Memo, largest, products, squares

PAIRS = 128  # from this many pairs of rows on, one product per token is faster


@dataclass(frozen=True)
class EmbeddingRows(Form):
    """Few rows of a V x d matrix: example n has the rows `ids[offsets[n]:offsets[n+1]]`, in
    ascending order.
    """

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
        return torch.repeat_interleave(
            torch.arange(len(self), device=self.ids.device),
            self.offsets.diff(),
            output_size=len(self.ids),  # else a GPU has to be asked for it
        )

    def dense(self) -> "Dense":
        out = self.values.new_zeros(len(self), self.shape[0], math.prod(self.shape[1:]))
        out[self.example, self.ids] = self.values
        return Dense(self.shape, out.flatten(1))

    def part(self, at: slice) -> "EmbeddingRows":
        offsets = self.offsets[at.start : at.stop + 1]
        rows = slice(int(offsets[0]), int(offsets[-1]))
        return EmbeddingRows(self.shape, self.ids[rows], self.values[rows], offsets - offsets[0])

    def take(self, index: Tensor) -> "EmbeddingRows":
        counts = self.offsets.diff()[index]
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        within = torch.arange(int(offsets[-1]), device=self.ids.device) - torch.repeat_interleave(
            offsets[:-1], counts
        )
        place = torch.repeat_interleave(self.offsets[:-1][index], counts) + within
        return EmbeddingRows(self.shape, self.ids[place], self.values[place], offsets)

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        """Only rows of the same token contribute."""
        if isinstance(queries, EmbeddingRows | Postings):
            return Postings.of(self).dot(queries.as_queries(), memo)
        return self.matvec(queries.dense().values.T)

    def as_queries(self) -> Form:
        return Postings.of(self)

    def matvec(self, vectors: Tensor) -> Tensor:
        K = vectors.shape[1]
        out = self.values.new_zeros(len(self), K)
        for k in range(K):  # one at a time: T x d numbers of memory, whatever K
            products = (self.values * vectors[:, k].reshape(self.shape[0], -1)[self.ids]).sum(1)
            out[:, k].index_add_(0, self.example, products)
        return out

    def rmatvec(self, weights: Tensor) -> Tensor:
        rows = self.values.new_zeros(weights.shape[1], self.shape[0], self.values.shape[1])
        for out, w in zip(rows, weights.T, strict=True):
            out.index_add_(0, self.ids, self.values * w[self.example, None])
        return rows.flatten(1).T

    def add_to(self, sums: Tensor, weights: Tensor) -> None:
        """It touches only stored rows: T x d numbers for each of K, whatever V."""
        for out, w in zip(sums.view(len(sums), self.shape[0], -1), weights.T, strict=True):
            out.index_add_(0, self.ids, self.values * w[self.example, None])

    def sqnorm(self) -> Tensor:
        return (
            squares(self.values)
            .new_zeros(len(self))
            .index_add_(0, self.example, squares(self.values))
        )

    def magnitude(self) -> Tensor:
        sizes = largest(self.values)
        return sizes.new_zeros(len(self)).index_add_(0, self.example, sizes)


@dataclass(frozen=True)
class Postings(Form):
    """An inverted index: token `tokens[u]` has the rows `starts[u]:starts[u+1]`, in ascending order
    of examples.

    The cache keeps word embeddings in this form: the common tokens of two texts are quick to find,
    and the rows of one token are adjacent.
    """

    kind = "postings"
    tokens: Tensor  # (U,) int64, ascending
    starts: Tensor  # (U+1,) int64
    example: Tensor  # (T,) int64
    values: Tensor  # (T, d)
    counts: Tensor  # (N,) int64: rows of each example

    @classmethod
    def of(cls, rows: EmbeddingRows) -> "Postings":
        order = torch.argsort(rows.ids, stable=True)
        tokens, counts = torch.unique_consecutive(rows.ids[order], return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(
            rows.shape, tokens, starts, rows.example[order], rows.values[order], rows.offsets.diff()
        )

    def rows(self) -> EmbeddingRows:
        order = torch.argsort(self.example, stable=True)  # by example, then by token
        ids = torch.repeat_interleave(self.tokens, self.starts.diff())[order]
        return EmbeddingRows(
            self.shape,
            ids,
            self.values[order],
            torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)]),
        )

    def tensors(self) -> dict[str, Tensor]:
        names = ("tokens", "starts", "example", "values", "counts")
        return {name: getattr(self, name) for name in names}

    def __len__(self) -> int:
        return len(self.counts)

    def dense(self) -> "Dense":
        return self.rows().dense()

    def part(self, at: slice) -> "Form":
        return Postings.of(self.rows().part(at))

    def take(self, index: Tensor) -> "Form":
        return Postings.of(self.rows().take(index))

    def dot(self, queries: Form, memo: Memo | None = None) -> Tensor:
        """Cost d per pair of rows of one token. A token with many pairs gets one matrix product;
        all other pairs are multiplied one by one.
        """
        if isinstance(queries, EmbeddingRows):
            queries = Postings.of(queries)
        if not isinstance(queries, Postings):
            return self.rows().dot(queries, memo)
        out = self.values.new_zeros(len(self), Q := len(queries))
        if not len(self.tokens):
            return out
        place = torch.searchsorted(self.tokens, queries.tokens).clamp(max=len(self.tokens) - 1)
        # of the tokens that both sides have
        other_rows = (self.tokens[place] == queries.tokens).nonzero().flatten()
        own_rows = place[other_rows]
        common = torch.stack(
            [
                self.starts[:-1][own_rows],
                self.starts.diff()[own_rows],
                queries.starts[:-1][other_rows],
                queries.starts.diff()[other_rows],
            ]
        )
        often = common[1] * common[3] > PAIRS
        for a, n, b, m in common[:, often].T.tolist():
            at = self.example[a : a + n, None] * Q + queries.example[b : b + m]
            out.view(-1).index_add_(
                0,
                at.flatten(),
                products(queries.values[b : b + m], self.values[a : a + n]).T.flatten(),
            )
        limit = max(1, PART_BYTES // (2 * self.values[:1].nbytes))
        for row, query_row in pairs(common[:, ~often], limit):
            at = self.example[row] * Q + queries.example[query_row]
            out.view(-1).index_add_(0, at, (self.values[row] * queries.values[query_row]).sum(1))
        return out

    def select(self, kept: Tensor) -> "Postings":
        """Only the rows of a (T,) mask."""
        if bool(kept.all()):
            return self
        token = torch.repeat_interleave(
            torch.arange(len(self.tokens), device=kept.device), self.starts.diff()
        )
        counts = torch.bincount(token[kept], minlength=len(self.tokens))
        present = counts > 0
        starts = torch.cat([counts.new_zeros(1), counts[present].cumsum(0)])
        example = self.example[kept]
        return Postings(
            self.shape,
            self.tokens[present],
            starts,
            example,
            self.values[kept],
            torch.bincount(example, minlength=len(self)),
        )

    def matvec(self, vectors: Tensor) -> Tensor:
        return self.rows().matvec(vectors)

    def rmatvec(self, weights: Tensor) -> Tensor:
        return self.rows().rmatvec(weights)

    def sqnorm(self) -> Tensor:
        norms = squares(self.values)
        return norms.new_zeros(len(self)).index_add_(0, self.example, norms)


def pairs(common: Tensor, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each column (a, n, b, m) all pairs (a + i, b + j) with i < n and j < m, at most `limit`
    at once.
    """
    (own_rows, _, other_rows, columns), counts = common, common[1] * common[3]
    entry = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    within = torch.arange(len(entry), device=counts.device) - (counts.cumsum(0) - counts)[entry]
    first, second = (
        own_rows[entry] + within // columns[entry],
        other_rows[entry] + within % columns[entry],
    )
    yield from zip(first.split(limit), second.split(limit), strict=True) if len(entry) else ()
