"""Every form against the dense matrix it stands for."""

import pytest
import torch

from influence_cli.gradients.forms import FORMS, Dense, Factors, Projected, Rows, concat, from_tensors, smallest

torch.manual_seed(0)


def gradients(count: int = 6, zero_rows: bool = True) -> torch.Tensor:
    values = torch.randn(count, 7, 3, dtype=torch.float64)
    return values * (torch.rand(count, 7, 1) < 0.3) if zero_rows else values


def forms() -> dict[str, tuple]:
    rows = smallest(gradients(), embedding=True)
    assert isinstance(rows, Rows)
    factors = Factors((5, 4), torch.randn(6, 3, 5, dtype=torch.float64), torch.randn(6, 3, 4, dtype=torch.float64))
    return {
        "rows": (rows, smallest(gradients(4), embedding=True)),
        "factors": (factors, Factors((5, 4), factors.left[:2], factors.right[:2])),
        "dense": (Dense((7, 3), gradients().flatten(1)), Dense((7, 3), gradients(4).flatten(1))),
        "projected": (Projected((7, 3), gradients()[:, :2].flatten(1)), Projected((7, 3), gradients(4)[:, :2].flatten(1))),
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
    torch.testing.assert_close(concat([form, other]).dense().values, torch.cat([form.dense().values, other.dense().values]))
    again = from_tensors(form.kind, form.shape, form.tensors())
    torch.testing.assert_close(again.dense().values, form.dense().values)


def test_forms_of_different_kinds_are_joined_densely():
    rows, dense = smallest(gradients(), embedding=True), smallest(gradients(3, zero_rows=False), embedding=True)
    assert dense.kind == "dense"
    joined = concat([rows, dense])
    torch.testing.assert_close(joined.dense().values, torch.cat([rows.dense().values, dense.dense().values]))


def test_an_example_without_any_row_is_zero():
    values = gradients(3)
    values[1] = 0
    rows = smallest(values, embedding=True)
    assert rows.sqnorm()[1] == 0
    assert rows.dense().values[1].abs().sum() == 0
    torch.testing.assert_close(rows.dense().values, values.flatten(1))
