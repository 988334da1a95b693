"""Id specs against a plain reading of the same text."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_cli.api import specs
from influence_cli.errors import UsageProblem

SIZE = 50
part = st.one_of(
    st.integers(0, SIZE - 1).map(lambda i: (str(i), {i})),
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).filter(lambda p: p[0] < p[1]).map(
        lambda p: (f"{p[0]}:{p[1]}", set(range(*p)))
    ),
    st.integers(0, SIZE - 1).map(lambda i: (f"{i}:", set(range(i, SIZE)))),
    st.integers(1, SIZE).map(lambda i: (f":{i}", set(range(i)))),
)  # fmt: skip


@given(st.lists(part, min_size=1, max_size=6), st.sampled_from([",", "\n", " ", ", "]))
def test_ids_are_the_union_rising_and_distinct(parts, separator):
    text = separator.join(text for text, _ in parts)
    wanted = sorted(set().union(*(ids for _, ids in parts)))
    assert (
        np.asarray(specs.ids("--train", "-", SIZE, "train", io.StringIO(text))).tolist() == wanted
    )
    if separator == ",":
        assert (
            np.asarray(specs.ids("--train", text, SIZE, "train", io.StringIO())).tolist() == wanted
        )


@given(st.text(alphabet="0123456789:,-@ab. ", max_size=12))
def test_any_text_is_ids_or_a_usage_problem(text):
    try:
        found = np.asarray(specs.ids("--train", text, SIZE, "train", io.StringIO("1")))
    except UsageProblem as problem:
        assert "--train" in str(problem)
    else:
        assert len(found)
        assert found.min() >= 0
        assert found.max() < SIZE
        assert (np.diff(found) > 0).all()


def test_a_file_of_ids_may_have_comments_and_ranges(tmp_path):
    (tmp_path / "ids.txt").write_text("3 # three\n\n10:12\n# none\n7,8\n")
    assert np.asarray(
        specs.ids("--queries", f"@{tmp_path}/ids.txt", SIZE, "query", io.StringIO())
    ).tolist() == [3, 7, 8, 10, 11]


@pytest.mark.parametrize("last", ["7", "20", "9" * 30, "x", "3:5"])
def test_a_long_list_is_read_like_a_short_one(last):
    spec = ",".join(["3", "1", "3", last])
    try:
        expected = list(specs.ids("--queries", last, 20, "query", io.StringIO()))
    except UsageProblem as error:
        with pytest.raises(UsageProblem, match=re.escape(str(error).splitlines()[0])):
            specs.ids("--queries", spec, 20, "query", io.StringIO())
    else:
        assert list(specs.ids("--queries", spec, 20, "query", io.StringIO())) == sorted(
            {1, 3, *expected}
        )


def test_a_contiguous_spec_is_a_range_so_that_memory_stays_flat():
    assert specs.ids("--train", "0:1000000000", 10**9, "train", io.StringIO()) == range(10**9)
    assert specs.ids("--train", None, 10**9, "train", io.StringIO()) == range(10**9)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5", ""])
def test_top_is_a_number_from_one_or_all(value):
    with pytest.raises(UsageProblem, match="--top"):
        specs.top(value)
    assert specs.top("all") is None
    assert specs.top("3") == 3
