"""Tensor sketches (Pham & Pagh 2013): count sketches of both sides of a gradient, multiplied as
polynomials modulo x^K - 1.

The hashes are even: they collide less often than independent ones, and never where a side has at
most K numbers.

Letters: N examples (n: some of them), S positions, R rows of one side, K projected numbers, o x i
the parameter as a matrix.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from influence_cli.gradients.forms import PART_BYTES, Factors
from influence_cli.gradients.projection_map import FactoredMap
from influence_cli.gradients.random_tables import Tables
from influence_cli.gradients.sparse_forms import EmbeddingRows

# adding a number to its place costs about this many numbers and doublings of a Fourier transform
ADDING = 7


class TensorSketch(FactoredMap):
    """It folds both sides to at most K numbers, and multiplies them in the frequency domain.

    Where positions are many and K is large, it multiplies the two sides as matrices instead, summed
    over the positions. Then it adds the entry with places p and q to number p + q modulo K.
    """

    def __init__(self, tables: Tables, numbers: int) -> None:
        self.numbers = numbers
        self.left = CountSketch(tables, "left", tables.rows, numbers)
        self.right = CountSketch(tables, "right", tables.columns, numbers)

    @cached_property
    def entry_sums(self) -> "SignedSums":
        """Of the products of all pairs: K^2 places, made at first use."""
        places = (self.left.after[:, None] + self.right.after) % self.numbers
        negative = self.left.negative[:, None] ^ self.right.negative
        return SignedSums((places + self.numbers * negative).flatten(), self.numbers)

    def factors(self, form: Factors) -> Tensor:
        """Cost S (o + i), and the smaller of K^2 and S K log K, per example."""
        N, S, o, i = form.sizes
        entries, sketch_cost = self.left.width * self.right.width, S * self.numbers
        by_matrix = ADDING * entries <= sketch_cost * math.log2(2 * self.numbers)
        numbers = S * (o + i) + (entries if by_matrix else 4 * sketch_cost)
        step = max(1, PART_BYTES // (numbers * form.left.element_size()))
        parts = []
        for first in range(0, N, step):
            at = slice(first, first + step)
            left = self.left(form.left[at].reshape(-1, o))
            right = self.right(form.right[at].reshape(-1, i))
            multiply = self._by_matrix if by_matrix else self._by_frequency
            parts.append(multiply(left, right, S))
        return torch.cat(parts)

    def _by_matrix(self, left: Tensor, right: Tensor, S: int) -> Tensor:
        """(n S, width) of both sides -> (n, K)."""
        left, right = left.view(-1, S, self.left.width), right.view(-1, S, self.right.width)
        return self.entry_sums(torch.bmm(left.transpose(1, 2), right).flatten(1))

    def _by_frequency(self, left: Tensor, right: Tensor, S: int) -> Tensor:
        """(n S, width) of both sides -> (n, K)."""
        product = torch.fft.rfft(self.left.placed(left))
        product.mul_(torch.fft.rfft(self.right.placed(right)))
        return torch.fft.irfft(product.view(-1, S, product.shape[1]).sum(1), self.numbers)

    def dense(self, part: Tensor) -> Tensor:
        """Of (n, o i) gradients. Cost o i per example."""
        columns = self.right(part.view(-1, self.right.count))
        entries = self.left(columns.view(len(part), self.left.count, self.right.width))
        return self.entry_sums(entries.flatten(1))

    def rows(self, form: EmbeddingRows) -> Tensor:
        """Of an embedding's rows: the place of a row's token rotates its sketch."""
        out = form.values.new_zeros(len(form), self.numbers)
        steps = torch.arange(self.numbers, device=form.device)
        step = max(1, PART_BYTES // (8 * self.numbers))
        for first in range(0, len(form.ids), step):
            at = slice(first, first + step)
            ids = form.ids[at]
            placed = self.right.placed(self.right(form.values[at])) * self.left.signs[ids, None]
            rotated = (steps - self.left.places[ids, None]) % self.numbers
            out.index_add_(0, form.example[at], placed.gather(1, rotated))
        return out


class SignedSums:
    """Adds numbers to K places: (n, count, ...) -> (n, K, ...). Place p adds to number p, place
    K + p subtracts from it.
    """

    def __init__(self, places: Tensor, numbers: int) -> None:
        self.places, self.numbers = places, numbers

    def __call__(self, values: Tensor) -> Tensor:
        sums = values.new_zeros(len(values), 2 * self.numbers, *values.shape[2:])
        sums.index_add_(1, self.places, values)
        return sums[:, : self.numbers] - sums[:, self.numbers :]


class CountSketch:
    """A count sketch of one side. A side of at most K numbers stays as it is: then `after` holds
    the places of its numbers, and `negative` their signs, for a later step.
    """

    def __init__(self, tables: Tables, side: str, count: int, numbers: int) -> None:
        self.count, self.width = count, min(count, numbers)
        self.signs = tables.signs(side, count)
        order = tables.order(side, max(count, numbers))[:count]
        self.places = torch.from_numpy(order % numbers).to(tables.device)
        self.sums = SignedSums(self.places + numbers * (self.signs < 0), numbers)
        folds = count > numbers
        self.after = torch.arange(numbers, device=tables.device) if folds else self.places
        self.negative = torch.zeros_like(self.after, dtype=torch.bool) if folds else self.signs < 0

    def __call__(self, values: Tensor) -> Tensor:
        """(R, count) -> (R, width), or (n, count, b) -> (n, width, b)."""
        return self.sums(values) if self.count > self.width else values

    def placed(self, folded: Tensor) -> Tensor:
        """(R, width) -> (R, K): every number at its place, with its sign."""
        return folded if self.count > self.width else self.sums(folded)
