"""Rankings against sorting everything, whatever the blocks, the ties and the order of arrival."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli.output.ranking import FullRanking, TopRanking

SCORES = st.lists(
    st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.0 + 1e-16, 3.0, 1e-300, -1e300]),
    min_size=1,
    max_size=60,
)


def feed(ranking, scores, cuts, order, parts=None):
    """Blocks of the columns of (Q, N) scores, cut at `cuts`, in the order of `order`."""
    blocks = np.split(
        np.arange(scores.shape[1]), sorted({cut % scores.shape[1] for cut in cuts} - {0})
    )
    for number in sorted(range(len(blocks)), key=lambda i: order[i % len(order)] if order else i):
        ids = blocks[number]
        ranking.add(ids, scores[:, ids], parts[:, :, ids] if parts is not None else None)


def expected(
    scores: np.ndarray, k: int | None, signed: bool = True
) -> list[tuple[str, int, int, float]]:
    """By sorting all: proponents falling, opponents rising, ties by id. k None: zeros are the last proponents."""
    pairs = [(float(s), i) for i, s in enumerate(scores)]
    up = sorted(
        (p for p in pairs if p[0] > 0 or not signed or (k is None and p[0] == 0)),
        key=lambda p: (-p[0], p[1]),
    )
    down = sorted((p for p in pairs if p[0] < 0 and signed), key=lambda p: (p[0], p[1]))
    return [("proponent", r, i, s) for r, (s, i) in enumerate(up[:k], 1)] + [
        ("opponent", r, i, s) for r, (s, i) in enumerate(down[:k], 1)
    ]


def found(ranking, query=0):
    return [(e.kind, e.rank, e.train, e.score) for e in ranking.entries(query)]


@given(
    SCORES,
    st.integers(1, 12),
    st.lists(st.integers(0, 59)),
    st.lists(st.integers(0, 9), max_size=6),
)
def test_top_equals_sorting_everything(scores, k, cuts, order):
    values = np.array([scores, scores[::-1]])
    ranking = TopRanking(2, 0, k)
    feed(ranking, values, cuts, order)
    for query in range(2):
        assert found(ranking, query) == expected(values[query], k)


@given(SCORES, st.integers(1, 12), st.lists(st.integers(0, 59)))
def test_unsigned_top_is_simply_the_highest(scores, k, cuts):
    ranking = TopRanking(1, 0, k, signed=False)
    feed(ranking, np.array([scores]), cuts, [])
    assert found(ranking) == expected(np.array(scores), k, signed=False)


@settings(max_examples=60)
@given(
    SCORES,
    st.lists(st.integers(0, 59)),
    st.integers(1, 40),
    st.lists(st.integers(0, 9), max_size=6),
)
def test_all_spilled_in_runs_equals_sorting_everything(scores, cuts, rows, order):
    values = np.array([scores, scores[::-1]])
    ranking = FullRanking(2, 0, run_bytes=rows * 17 * 2)
    feed(ranking, values, cuts, order)
    for query in (1, 0):
        assert found(ranking, query) == expected(values[query], None)


@pytest.mark.parametrize(
    "make", [lambda q, p: TopRanking(q, p, 4), lambda q, p: FullRanking(q, p, run_bytes=200)]
)
def test_parts_stay_with_their_pair(make):
    parts = np.random.default_rng(0).normal(size=(3, 2, 30))
    ranking = make(2, 3)
    feed(ranking, parts.sum(0), [7, 11, 23], [3, 1, 2], parts)
    for query in range(2):
        for entry in ranking.entries(query):
            assert entry.parts == tuple(parts[:, query, entry.train])


@given(SCORES, st.integers(1, 12), st.lists(st.integers(0, 59)), st.integers(1, 4))
@pytest.mark.parametrize("full", [False, True])
def test_merged_rankings_of_ranks_equal_one_ranking(full, scores, k, cuts, count):
    """Each rank ranks every `count`-th block; rank 0 takes in the others' partial rankings."""
    parts = np.array([[scores, scores[::-1]], [scores[::-1], scores]])
    values = parts.sum(0)

    def new_ranking():
        return FullRanking(2, 2, run_bytes=2000) if full else TopRanking(2, 2, k)

    ranks = [new_ranking() for _ in range(count)]
    blocks = np.split(np.arange(len(scores)), sorted({cut % len(scores) for cut in cuts} - {0}))
    for number, ids in enumerate(blocks):
        ranks[number % count].add(ids, values[:, ids], parts[:, :, ids])
    for rank in ranks[1:]:
        for partial in rank.export_partials():
            ranks[0].import_partial(partial)
    for query in range(2):
        assert found(ranks[0], query) == expected(values[query], None if full else k)
        for entry in ranks[0].entries(query):
            assert entry.parts == tuple(parts[:, query, entry.train])


FLAT = """
import resource, sys
import numpy as np
from influence_cli.output.ranking import FullRanking, TopRanking
count, full = int(sys.argv[1]), sys.argv[2] == "all"
ranking = FullRanking(4, 0, run_bytes=4 << 20) if full else TopRanking(4, 0, 10)
rng = np.random.default_rng(0)
for first in range(0, count, 4096):
    ids = np.arange(first, min(first + 4096, count))
    ranking.add(ids, rng.normal(size=(4, len(ids))))
rows = sum(1 for query in range(4) for _ in ranking.entries(query))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("top", ["10", "all"])
def test_memory_is_flat_in_the_number_of_examples(top):
    def run(count):
        out = subprocess.run(
            [sys.executable, "-c", FLAT, str(count), top],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        return int(out[0]), int(out[1])

    (_, few), (rows, many) = run(10_000), run(1_000_000)
    assert rows == (4_000_000 if top == "all" else 80)
    assert many - few < 30_000, (
        f"{many - few} KiB more for 100 times the examples"
    )  # their scores alone would be 31,250


@pytest.mark.parametrize("make", [lambda: TopRanking(2, 0, 4), lambda: FullRanking(2, 0)])
def test_a_ranking_of_nothing_has_no_entries(make):
    assert [list(make().entries(query)) for query in range(2)] == [[], []]
