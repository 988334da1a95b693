"""Every form against the dense matrix it stands for."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from influence_cli.gradients import forms as forms_module
from influence_cli.gradients.form_ops import (
    FORMS,
    cheapest,
    concat,
    distance,
    from_tensors,
    merged,
    padded,
    smallest,
)
from influence_cli.gradients.forms import Dense, Factors, Form, Projected
from influence_cli.gradients.row_products import squares
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings

torch.manual_seed(0)


def gradients(count: int = 6, zero_rows: bool = True) -> torch.Tensor:
    values = torch.randn(count, 7, 3, dtype=torch.float64)
    return values * (torch.rand(count, 7, 1) < 0.3) if zero_rows else values


def forms() -> dict[str, tuple]:
    rows = smallest(gradients(), embedding=True)
    assert isinstance(rows, EmbeddingRows)
    factors = Factors(
        (5, 4), torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64)
    )
    return {
        "rows": (rows, smallest(gradients(4), embedding=True)),
        "postings": (Postings.of(rows), Postings.of(smallest(gradients(4), embedding=True))),
        "factors": (factors, Factors((5, 4), factors.left[:2], factors.right[:2])),
        "dense": (Dense((7, 3), gradients().flatten(1)), Dense((7, 3), gradients(4).flatten(1))),
        "projected": (
            Projected((7, 3), gradients()[:, :2].flatten(1)),
            Projected((7, 3), gradients(4)[:, :2].flatten(1)),
        ),
    }


def test_every_form_is_tested():
    assert set(forms()) == set(FORMS)


@pytest.mark.parametrize("kind", FORMS)
def test_products_and_norms_equal_the_dense_ones(kind):
    form, queries = forms()[kind]
    dense, dense_queries = form.dense().values, queries.dense().values
    expected = dense @ dense_queries.T
    for other in (queries, queries.dense()):
        torch.testing.assert_close(form.dot(other), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(form.dense().dot(other), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.sqnorm(), dense.square().sum(1), rtol=1e-12, atol=1e-12)
    assert len(form) == len(dense)


@pytest.mark.parametrize("kind", FORMS)
def test_take_concat_and_round_trip_keep_the_gradients(kind):
    form, other = forms()[kind]
    order = torch.tensor([4, 0, 4, 2])
    torch.testing.assert_close(form.take(order).dense().values, form.dense().values[order])
    torch.testing.assert_close(
        concat([form, other]).dense().values, torch.cat([form.dense().values, other.dense().values])
    )
    again = from_tensors(form.kind, form.shape, form.tensors())
    torch.testing.assert_close(again.dense().values, form.dense().values)


def test_forms_of_different_kinds_are_joined_densely():
    rows, dense = (
        smallest(gradients(), embedding=True),
        smallest(gradients(3, zero_rows=False), embedding=True),
    )
    assert dense.kind == "dense"
    joined = concat([rows, dense])
    torch.testing.assert_close(
        joined.dense().values, torch.cat([rows.dense().values, dense.dense().values])
    )


def test_an_example_without_any_row_is_zero():
    values = gradients(3)
    values[1] = 0
    rows = smallest(values, embedding=True)
    assert rows.sqnorm()[1] == 0
    assert rows.dense().values[1].abs().sum() == 0
    torch.testing.assert_close(rows.dense().values, values.flatten(1))


# ------------------------------------------------------------ the operators over random sizes
def over_random_sizes(examples: int):
    chosen = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    return lambda test: chosen(given(data=st.data())(test))


def random_form(
    kind: str, N: int, o: int, i: int, S: int, dtype: torch.dtype = torch.float64
) -> Form:
    """N gradients of an o x i matrix; rows: some of an example's are used, perhaps none."""
    if kind == "factors":
        return Factors((o, i), torch.randn(N, S, o, dtype=dtype), torch.randn(N, S, i, dtype=dtype))
    used = (torch.rand(N, o) < 0.4).nonzero()
    if kind in ("rows", "postings"):
        offsets = torch.cat(
            [torch.zeros(1, dtype=torch.int64), torch.bincount(used[:, 0], minlength=N).cumsum(0)]
        )
        rows = EmbeddingRows(
            (o, i), used[:, 1].contiguous(), torch.randn(len(used), i, dtype=dtype), offsets
        )
        return rows if kind == "rows" else Postings.of(rows)
    return FORMS[kind]((o, i), torch.randn(N, o * i, dtype=dtype))  # type: ignore[call-arg]


def drawn(data, *kinds: str, dtype: torch.dtype = torch.float64) -> list[Form]:
    """One form of each kind, of other numbers of examples and positions, for one matrix."""
    o, i = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    return [
        random_form(kind, data.draw(st.integers(1, 5)), o, i, data.draw(st.integers(1, 6)), dtype)
        for kind in kinds
    ]


EXACT = ("dense", "factors", "rows", "postings")
PAIRS = [(left, right) for left in EXACT for right in EXACT] + [("projected", "projected")]


@pytest.mark.parametrize("kinds", PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@over_random_sizes(15)
def test_products_of_any_two_forms_equal_the_dense_ones(kinds, dtype, data):
    left, right = drawn(data, *kinds, dtype=dtype)
    G, Q = left.dense().values.double(), right.dense().values.double()
    allowed = (
        1e-12 if dtype == torch.float64 else 1e-5
    )  # of the largest: at most 49 x 36 terms of eps 6e-8 each, of random sign
    for queries in (right, right.as_queries()):
        for memo in (None, {}):
            actual = left.dot(queries, memo)
            assert actual.dtype == dtype
            assert (actual - G @ Q.T).abs().max() <= allowed * (1 + (G.abs() @ Q.abs().T).max())


@pytest.mark.parametrize("kind", FORMS)
@over_random_sizes(25)
def test_operators_equal_those_of_the_dense_matrix(kind, data):
    (form,) = drawn(data, kind)
    G, K = form.dense().values, data.draw(st.integers(1, 4))
    N, D = G.shape
    vectors, weights = (
        torch.randn(D, K, dtype=torch.float64),
        torch.randn(N, K, dtype=torch.float64),
    )
    torch.testing.assert_close(form.matvec(vectors), G @ vectors, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.rmatvec(weights), G.T @ weights, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.sqnorm(), G.square().sum(1), rtol=1e-12, atol=1e-12)
    for same in (form.as_queries(), cheapest(form)):
        torch.testing.assert_close(same.dense().values, G, rtol=1e-12, atol=1e-12)
    assert cheapest(form).nbytes <= form.nbytes
    first, last = sorted((data.draw(st.integers(0, N)), data.draw(st.integers(0, N))))
    part = form.part(slice(first, last))
    assert part.kind == kind
    assert len(part) == last - first
    torch.testing.assert_close(part.dense().values, G[first:last], rtol=1e-12, atol=1e-12)
    index = torch.randint(0, N, (data.draw(st.integers(1, 6)),))
    torch.testing.assert_close(form.take(index).dense().values, G[index], rtol=1e-12, atol=1e-12)


@over_random_sizes(25)
def test_added_positions_are_zero(data):
    (form,) = drawn(data, "factors")
    more = padded(form, form.left.shape[1] + data.draw(st.integers(0, 3)))
    torch.testing.assert_close(more.dense().values, form.dense().values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(more.sqnorm(), form.sqnorm(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        concat([form, more]).dense().values,
        form.dense().values.repeat(2, 1),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("kinds", [(a, b) for a in EXACT for b in EXACT], ids="-".join)
@over_random_sizes(15)
def test_merged_is_the_sum_and_leaves_its_parts_as_they_were(kinds, data):
    N, o, i = (data.draw(st.integers(1, 5)) for _ in range(3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    first, second = (random_form(kind, N, o, i, data.draw(st.integers(1, 4))) for kind in kinds)
    before = [form.dense().values.clone() for form in (first, second)]
    torch.testing.assert_close(
        merged(first, second).dense().values, before[0] + before[1], rtol=1e-12, atol=1e-12
    )
    assert all(
        torch.equal(form.dense().values, values)
        for form, values in zip((first, second), before, strict=True)
    )


def test_parts_made_a_few_at_a_time_equal_the_whole(monkeypatch):
    monkeypatch.setattr(forms_module, "PART_BYTES", 8 * 6 * 5 * 2)  # two examples of six by five
    torch.manual_seed(0)
    form = random_form("factors", 7, 6, 5, 4)
    G, vectors = form.dense().values, torch.randn(30, 3, dtype=torch.float64)
    assert [at for at, _ in form.parts()] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 7)]
    torch.testing.assert_close(form.matvec(vectors), G @ vectors, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(form.sqnorm(), G.square().sum(1), rtol=1e-12, atol=1e-12)


def test_products_of_a_layer_larger_than_a_slice_equal_the_dense_ones():
    torch.manual_seed(0)
    o, i = 1024, 600
    left = torch.randn(3, 4, o, dtype=torch.float64)
    right = torch.randn(3, 4, i, dtype=torch.float64)
    form, vectors = Factors((o, i), left, right), torch.randn(o * i, 2, dtype=torch.float64)
    assert o * i * 8 >= forms_module.SLICED_BYTES
    expected = form.dense().values @ vectors
    torch.testing.assert_close(form.matvec(vectors), expected, rtol=1e-12, atol=1e-9)


def test_a_memo_shares_products_of_the_same_tensors_only():
    """Tensors that were converted for one product are gone after it, and others come to lie where
    they were.
    """
    torch.manual_seed(0)
    query, memo = Dense((300,), torch.randn(5, 300)), {}
    for _ in range(20):
        rows = Dense((300,), torch.randn(40, 300).bfloat16())
        actual = rows.to(torch.device("cpu"), torch.float32).dot(query, memo)
        torch.testing.assert_close(
            actual, rows.values.float() @ query.values.T, rtol=1e-4, atol=1e-4
        )
    shared = Dense((300,), torch.randn(40, 300))
    assert shared.dot(query, memo) is shared.dot(query, memo)


# ------------------------------------------------------------ norms beyond the range of float32's squares
SCALES = (1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e20, 1e30)


@over_random_sizes(60)
def test_squares_are_right_at_every_scale(data):
    """float32's squares reach from 1e-38 to 1e38 only; rows of different scales in one tensor, and
    within a row.
    """
    width = data.draw(st.sampled_from([1, 3, 1024, 2048, 2049, 5000]))
    rows = [data.draw(st.sampled_from(SCALES)) for _ in range(data.draw(st.integers(1, 5)))]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    values = torch.randn(len(rows), width) * torch.tensor(rows)[:, None]
    values[:, : width // 2] *= data.draw(st.sampled_from([1.0, 1e-8, 0.0]))
    torch.testing.assert_close(squares(values), values.double().square().sum(1), rtol=1e-5, atol=0)


@over_random_sizes(60)
def test_norms_of_factors_are_right_at_every_scale(data):
    """The factors' scales may lie far apart: a vanishing gradient of a large activation."""
    left = data.draw(st.sampled_from(SCALES[1:-1]))
    right = data.draw(st.sampled_from([scale for scale in SCALES if 1e-31 < scale * left < 1e31]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    form = random_form("factors", 3, 40, 50, data.draw(st.sampled_from([1, 3, 30])), torch.float32)
    scaled = Factors(form.shape, form.left * left, form.right * right)
    exact = scaled.to(torch.device("cpu"), torch.float64).dense().values.square().sum(1)
    torch.testing.assert_close(scaled.sqnorm(), exact, rtol=1e-4, atol=0)


def test_norms_of_positions_that_cancel_are_not_negative():
    """A sum of products of float32 may fall below zero, and a root of that is no number."""
    torch.manual_seed(0)
    for _ in range(50):
        left, right = torch.randn(4, 3, 40), torch.randn(4, 1, 50).expand(4, 3, 50).contiguous()
        left[:, 2] = -(left[:, 0] + left[:, 1])
        norms = Factors((40, 50), left, right).sqnorm()
        assert (norms >= 0).all()
        assert (norms <= 1e-5 * left.square().sum((1, 2)) * right.square().sum((1, 2))).all()


@pytest.mark.parametrize("positions", [1, 3, 30])
def test_norms_of_half_precision_factors_are_taken_in_float32(positions):
    torch.manual_seed(0)
    form = random_form("factors", 3, 40, 50, positions, torch.float32).to(
        torch.device("cpu"), torch.bfloat16
    )
    exact = form.to(torch.device("cpu"), torch.float64).sqnorm()
    torch.testing.assert_close(form.sqnorm(), exact, rtol=1e-5, atol=0)


def test_zero_and_broken_gradients_keep_their_norm():
    values = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    assert squares(values).tolist()[0] == 0
    assert squares(values).isnan().tolist() == [False, True, False]
    assert squares(values).isinf().tolist() == [False, False, True]


@over_random_sizes(25)
def test_postings_lie_by_token_and_select_keeps_what_it_says(data):
    (form,) = drawn(data, "postings")
    assert isinstance(form, Postings)
    tokens = torch.repeat_interleave(form.tokens, form.starts.diff())
    assert (tokens.diff() >= 0).all()
    kept = torch.rand(len(tokens)) < 0.5
    expected = form.dense().values.view(len(form), *form.shape).clone()
    expected[form.example[~kept], tokens[~kept]] = 0
    torch.testing.assert_close(form.select(kept).dense().values, expected.flatten(1))
    assert len(form.select(kept)) == len(form)


@over_random_sizes(25)
def test_the_distance_of_two_forms_is_that_of_their_matrices(data):
    for kinds in (
        ("rows", "rows"),
        ("postings", "postings"),
        ("dense", "factors"),
        ("factors", "factors"),
    ):
        first, second = drawn(data, *kinds)
        second = second.take(torch.zeros(len(first), dtype=torch.int64))
        expected = (first.dense().values - second.dense().values).norm(dim=1)
        torch.testing.assert_close(distance(first, second), expected, rtol=1e-12, atol=1e-12)
