"""Operations on forms: the cheapest exact form, sums, distances, concatenation, and reading from a
file.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from influence_cli.gradients.deferred_forms import DeferredForm, TiedForm
from influence_cli.gradients.forms import Dense, Factors, Form, Projected
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings

FORMS: dict[str, type[Form]] = {
    form.kind: form for form in (Dense, Factors, EmbeddingRows, Postings, Projected)
}


def from_tensors(kind: str, shape: Sequence[int], tensors: dict[str, Tensor]) -> Form:
    return FORMS[kind](tuple(shape), **tensors)


def cheapest(form: Form) -> Form:
    """The same gradients in the exact form with the fewest numbers: factors S (o + i), dense
    o i.
    """
    if isinstance(form, Factors):
        _, S, o, i = form.sizes
        return form if S * (o + i) < o * i else form.dense()
    return form.dense() if isinstance(form, DeferredForm) else form


def merged(first: Form, second: Form) -> Form:
    """The sum of two forms of the same examples, as for a parameter that is used twice."""
    if isinstance(first, Factors) and isinstance(second, Factors):
        pairs = zip(first.tensors().values(), second.tensors().values(), strict=True)
        return Factors(first.shape, *(torch.cat(pair, dim=1) for pair in pairs))
    if isinstance(first, EmbeddingRows) and isinstance(second, EmbeddingRows):
        tokens, size = first.shape[0], len(first)
        keys = torch.cat([part.example * tokens + part.ids for part in (first, second)])
        distinct, place = torch.unique(
            keys, return_inverse=True
        )  # ascending by example, then by id
        values = first.values.new_zeros(len(distinct), first.values.shape[1])
        values.index_add_(0, place, torch.cat([first.values, second.values]))
        counts = torch.bincount(distinct // tokens, minlength=size)
        return EmbeddingRows(
            first.shape,
            distinct % tokens,
            values,
            torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        )
    if isinstance(first, EmbeddingRows):
        first, second = second, first
    if isinstance(second, EmbeddingRows) and isinstance(first, Factors):
        return TiedForm(first.shape, first, second)
    if isinstance(second, EmbeddingRows) and isinstance(first, TiedForm):
        rows = merged(first.rows, second)
        assert isinstance(rows, EmbeddingRows)
        return TiedForm(first.shape, first.factors, rows)
    tied, other = (first, second) if isinstance(first, TiedForm) else (second, first)
    if isinstance(tied, TiedForm) and isinstance(other, Factors):
        factors = merged(tied.factors, other)
        assert isinstance(factors, Factors)
        return TiedForm(tied.shape, factors, tied.rows)
    values = first.values.clone() if isinstance(first, Dense) else first.dense().values
    if isinstance(second, EmbeddingRows):  # an example's ids are distinct
        values.view(len(second), second.shape[0], -1)[second.example, second.ids] += second.values
    else:
        values += second.dense().values
    return Dense(first.shape, values)


def distance(first: Form, second: Form) -> Tensor:
    """(N,) float64: the norm of the difference of each example's two gradients."""
    pair = [form.rows() if isinstance(form, Postings) else form for form in (first, second)]
    if all(isinstance(form, EmbeddingRows) for form in pair):
        first_values, second_values = (
            dataclasses.replace(form, values=form.values.double())
            for form in pair
            if isinstance(form, EmbeddingRows)
        )
        return (
            merged(first_values, dataclasses.replace(second_values, values=-second_values.values))
            .sqnorm()
            .sqrt()
        )
    return (first.dense().values.double() - second.dense().values.double()).norm(dim=1)


LEAST, MOST = 1e-12, 1e12  # of numbers whose products with gradients are safe in float32


def scale_rows(form: Form) -> tuple[Form, Tensor | None]:
    """The form with each row divided by a power of two, and these powers, (N,) float64; the form
    itself, and None, where the largest numbers of all rows are between LEAST and MOST.
    """
    example = form.example if isinstance(form, EmbeddingRows | Postings) else None
    largest = {}
    for name, value in form.tensors().items():
        if value.is_floating_point() and value.numel():
            sizes = torch.linalg.vector_norm(value.flatten(1), ord=torch.inf, dim=1).double()
            if example is not None:
                sizes = sizes.new_zeros(len(form)).scatter_reduce(0, example, sizes, "amax")
            largest[name] = sizes
    if all(
        bool(((sizes == 0) | ((sizes > LEAST) & (sizes < MOST))).all())
        for sizes in largest.values()
    ):
        return form, None
    tensors, scale = form.tensors(), torch.ones(len(form), dtype=torch.float64, device=form.device)
    for name, sizes in largest.items():
        power = torch.ldexp(torch.ones_like(sizes), torch.frexp(sizes).exponent)
        of_row = power if example is None else power[example]
        value = tensors[name]
        divided = value.double() / of_row.view(-1, *[1] * (value.ndim - 1))
        tensors[name], scale = divided.to(value.dtype), scale * power
    return from_tensors(form.kind, form.shape, tensors), scale


def side_by_side(forms: Sequence[Form]) -> Form | None:
    """One form of projected gradients that are adjacent in memory, as the cache keeps them. None
    where they are not.
    """
    if len(forms) == 1:
        return forms[0]
    tensors = [form.values for form in forms if isinstance(form, Projected)]
    if (
        len(tensors) < len(forms)
        or len(
            {(value.untyped_storage().data_ptr(), value.stride(), len(value)) for value in tensors}
        )
        > 1
    ):
        return None
    for value, following in pairwise(tensors):
        if value.storage_offset() + value.shape[1] != following.storage_offset():
            return None
    width = sum(value.shape[1] for value in tensors)
    return Projected(
        (width,),
        tensors[0].as_strided(
            (len(tensors[0]), width), tensors[0].stride(), tensors[0].storage_offset()
        ),
    )


def concat(forms: Sequence[Form]) -> Form:
    """The examples of several forms of one parameter. The result is dense where the kinds
    differ.
    """
    if len(forms) == 1:
        return forms[0]
    if all(isinstance(form, Postings) for form in forms):
        rows = concat([form.rows() for form in forms if isinstance(form, Postings)])
        assert isinstance(rows, EmbeddingRows)
        return Postings.of(rows)
    if len({form.kind for form in forms}) > 1:
        forms = [form.dense() for form in forms]
    first = forms[0]
    if isinstance(first, EmbeddingRows):
        counts = torch.cat([form.tensors()["offsets"].diff() for form in forms])
        merged_rows = {
            name: torch.cat([form.tensors()[name] for form in forms]) for name in ("ids", "values")
        }
        return EmbeddingRows(
            first.shape, **merged_rows, offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        )
    if isinstance(first, Factors):
        longest = max(form.tensors()["left"].shape[1] for form in forms)
        forms = [padded(form, longest) for form in forms if isinstance(form, Factors)]
    return from_tensors(
        first.kind,
        first.shape,
        {name: torch.cat([form.tensors()[name] for form in forms]) for name in first.tensors()},
    )


def padded(form: Factors, positions: int) -> Factors:
    """Factors with more positions; the new ones are zero."""
    more = positions - form.left.shape[1]
    if not more:
        return form
    return Factors(
        form.shape,
        *(torch.nn.functional.pad(value, (0, 0, 0, more)) for value in (form.left, form.right)),
    )


def smallest(gradients: Tensor, embedding: bool) -> Form:
    """(B, *shape) gradients in the exact form with the fewest bytes: rows if most rows of an
    embedding are zero, else dense.
    """
    shape = tuple(gradients.shape[1:])
    if embedding and len(shape) == 2:
        used = (gradients != 0).any(2)  # (B, V)
        counts = used.sum(1)
        stored = int(counts.sum())
        row_bytes = shape[1] * gradients.element_size() + 8
        if stored * row_bytes + 8 * len(counts) < gradients.numel() * gradients.element_size():
            offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            return EmbeddingRows(shape, used.nonzero()[:, 1].contiguous(), gradients[used], offsets)
    return Dense(shape, gradients.reshape(len(gradients), -1))
