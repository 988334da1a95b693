"""Single functions of merging: what a cell holds, and whether parts were cut."""

import io
from types import SimpleNamespace

import pytest

from influence_cli.errors import TableError
from influence_cli.output.merge import (
    find_top_of_parts,
    merge_tables,
    open_tables,
    parse_score,
    parse_whole_number,
)

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


HEAD = "query,kind,rank,train,score,query_label,train_label,query_text,train_text"
SCORES = (
    ["0,proponent,1,3,2.0,,,,", "0,proponent,2,1,0.0,,,,", "0,opponent,1,2,-1.0,,,,"],
    ["0,proponent,1,5,3.0,,,,", "0,proponent,2,4,0.0,,,,", "0,opponent,1,6,-4.0,,,,"],
)
SELF_HEAD = "rank,train,score,loss,train_label,train_text"
SELF = (["1,3,2.0,0.1,,", "2,1,0.0,0.2,,"], ["1,5,0.0,0.3,,"])


@pytest.mark.parametrize(
    ("head", "parts", "k", "expected"),
    [
        # a score of 0 is no proponent of --top K, only the last one of --top all
        (HEAD, SCORES, 4, [(1, 5), (2, 3), (1, 6), (2, 2)]),
        (HEAD, SCORES, 1, [(1, 5), (1, 6)]),
        (HEAD, SCORES, None, [(1, 5), (2, 3), (3, 1), (4, 4), (1, 6), (2, 2)]),
        # --sum-queries writes the query `all`
        (
            HEAD,
            [[row.replace("0,", "all,", 1) for row in part] for part in SCORES],
            1,
            [(1, 5), (1, 6)],
        ),
        # self ranks zeros as any other score
        (SELF_HEAD, SELF, 2, [(1, 3), (2, 1)]),
        (SELF_HEAD, SELF, 9, [(1, 3), (2, 1), (3, 5)]),
    ],
)
def test_the_first_rows_of_each_kind_are_merged(head, parts, k, expected, tmp_path):
    names = []
    for number, rows in enumerate(parts):
        path = tmp_path / f"{number}.csv"
        path.write_text("\n".join([head, *rows, ""]))
        names.append(str(path))
    tables, columns = open_tables(names, io.StringIO())
    rank, train = columns.index("rank"), columns.index("train")
    merged = [(row[rank], row[train]) for row in merge_tables(tables, columns, k)]
    assert merged == expected


@pytest.mark.parametrize("row", ["0,proponent,1,all,2.0,,,,", "0,proponent,all,3,2.0,,,,"])
def test_only_a_query_may_be_all(row, tmp_path):
    path = tmp_path / "part.csv"
    path.write_text(f"{HEAD}\n{row}\n")
    tables, columns = open_tables([str(path)], io.StringIO())
    with pytest.raises(TableError, match="is 'all', expected a number"):
        list(merge_tables(tables, columns, None))
