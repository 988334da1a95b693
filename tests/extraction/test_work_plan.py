"""What is missing, against a loop that looks at each example of each column."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from influence_cli.cache.unit_file import Unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.extraction.work_plan import WorkPlan

COLUMNS, TOTAL = ("a", "b", "c"), 60


@st.composite
def units(draw):
    start = draw(st.integers(0, TOTAL - 1))
    stop = draw(st.integers(start + 1, TOTAL))
    columns = tuple(draw(st.lists(st.sampled_from(COLUMNS), min_size=1, unique=True)))
    ids = draw(
        st.one_of(
            st.none(), st.lists(st.integers(start, stop - 1), min_size=1, unique=True).map(sorted)
        )
    )
    level = draw(st.sampled_from(["values", "norms"]))
    return Unit(
        Path("folder"),
        "unit",
        columns,
        level,
        "text",
        start,
        stop,
        None if ids is None else np.array(ids),
    )


wanted_ids = st.one_of(
    st.tuples(st.integers(0, TOTAL - 1), st.integers(1, TOTAL)).map(
        lambda p: range(p[0], min(TOTAL, p[0] + p[1]))
    ),
    st.lists(st.integers(0, TOTAL - 1), min_size=1, unique=True).map(
        lambda ids: np.array(sorted(ids))
    ),
)


def holds(unit: Unit, column: str, level: str, example: int) -> bool:
    in_unit = unit.start <= example < unit.stop if unit.ids is None else example in unit.ids
    return in_unit and column in unit.columns and level in (unit.level, "norms")


@settings(max_examples=300, deadline=None)
@given(
    st.lists(units(), max_size=6),
    wanted_ids,
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.sampled_from(["values", "norms"]),
)
def test_what_is_missing(existing, ids, size, level):
    starts = []

    def unit(checkpoint, columns, start, ids):
        starts.append(start)
        return Unit(Path("folder"), "new", tuple(columns), level, "text", start, start + size, ids)

    missing = WorkPlan(COLUMNS, level, size, unit)
    missing.add("checkpoint", ids, UnitIndex(existing))
    lacking = {
        int(i): [c for c in COLUMNS if not any(holds(u, c, level, i) for u in existing)]
        for i in ids
    }
    expected = [i for i, columns in lacking.items() if columns]
    jobs = list(missing)
    assert [int(i) for job in jobs for i in job.ids] == expected
    assert missing.examples == len(expected) and len(missing) == len(jobs)
    assert [job.ids.tolist() for job in jobs] == [missing[k].ids.tolist() for k in range(len(jobs))]
    with pytest.raises(IndexError):
        missing[len(jobs)]
    for job in jobs:
        assert set(job.unit.columns) == {column for i in job.ids for column in lacking[int(i)]}
        if isinstance(ids, range):
            assert len({int(i) // size for i in job.ids}) == 1
    assert all(start % size == 0 for start in starts)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(units(), max_size=8),
    wanted_ids,
    st.sampled_from(COLUMNS),
    st.sampled_from(["values", "norms"]),
)
def test_where_names_the_first_unit_that_holds_each(existing, ids, column, level):
    array = np.array(list(ids))
    numbers = UnitIndex(existing).locate(column, level, array)
    for i, number in zip(array, numbers, strict=True):
        assert number == next(
            (k for k, unit in enumerate(existing) if holds(unit, column, level, i)), -1
        )
