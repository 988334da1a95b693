"""Products of factors of every number of positions, against dense gradients."""

import pytest
import torch

from influence_cli.gradients.forms import Factors


def factors(count, positions, seed):
    generator = torch.Generator().manual_seed(seed)
    sides = (
        torch.randn(count, positions, size, dtype=torch.float64, generator=generator)
        for size in (9, 11)
    )
    return Factors((9, 11), *sides)


@pytest.mark.parametrize("queries", [1, 2, 5])
@pytest.mark.parametrize("train", [1, 3, 6])
def test_products_of_factors_are_those_of_dense_gradients(train, queries):
    # 9 x 11 = 99 numbers: up to 4 pairs of positions are cheaper than dense gradients
    one, two = factors(4, train, 0), factors(3, queries, 1)
    expected = one.dense().values @ two.dense().values.T
    assert torch.allclose(one.dot(two), expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(one.dot(two.as_queries()), expected, rtol=1e-12, atol=1e-12)
