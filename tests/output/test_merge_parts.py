"""Single functions of merging: what a cell holds, and whether parts were cut."""

from types import SimpleNamespace

import pytest

from influence_cli.output.merge import find_top_of_parts, parse_score, parse_whole_number

LARGEST = (1 << 63) - 1


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        (str(LARGEST), LARGEST),
        (-LARGEST, -LARGEST),
        (str(LARGEST + 1), None),  # past 64 bits, numpy would raise
        (-LARGEST - 1, None),
        (True, None),
        ("1.0", None),
        ("all", None),
    ],
)
def test_a_whole_number_has_64_bits(cell, number):
    assert parse_whole_number(cell) == number


@pytest.mark.parametrize("cell", [LARGEST + 1, -LARGEST - 1, 10**400])
def test_a_score_that_is_a_huge_whole_number_is_infinite(cell):
    # merge then refuses it; float(10**400) would raise
    assert parse_score(cell) == float("inf")


def part(longest, ends, has_all_pairs=False):
    return SimpleNamespace(longest=longest, ends=set(ends), has_all_pairs=has_all_pairs)


@pytest.mark.parametrize(
    ("parts", "k", "top"),
    [
        ([part(5, {0, 1})], 9, 5),  # two queries end at rank 5: it was --top 5
        ([part(5, {0})], 9, None),  # one query: it may have no more pairs
        ([part(5, {0, 1}, has_all_pairs=True)], 9, None),
        ([part(5, {0, 1}), part(7, {0})], 9, None),  # a longer part: --top was not 5
        ([part(5, {0, 1})], 5, None),  # not more rows than there are
        ([part(5, {0, 1})], None, 5),
        ([part(0, {0, 1})], 9, None),
        ([], 9, None),
    ],
)
def test_parts_that_were_cut_are_recognized_by_their_ends(parts, k, top):
    assert find_top_of_parts(parts, k) == top
