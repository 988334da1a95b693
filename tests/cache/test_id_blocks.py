"""Selections of example ids."""

import pytest

from influence_cli.cache.id_blocks import spread_evenly


@pytest.mark.parametrize(
    ("count", "most", "positions"),
    [(0, 3, []), (1, 3, [0]), (3, 8, [0, 1, 2]), (9, 3, [0, 4, 8]), (100, 4, [0, 33, 66, 99])],
)
def test_spread_positions_include_both_ends(count, most, positions):
    assert spread_evenly(count, most) == positions
