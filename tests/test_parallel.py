"""Shards: what --shard may say, what job arrays say of themselves, and that each example is in one shard."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from influence_cli.errors import UsageProblem
from influence_cli.parallel.shards import FINE, Shard, parse_shard

SLURM = {
    "SLURM_ARRAY_TASK_ID": "7",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "8",
    "SLURM_ARRAY_TASK_STEP": "1",
    "SLURM_ARRAY_TASK_COUNT": "8",
}
NO_ARRAY = {
    "SLURM_ARRAY_TASK_ID": "",
    "LSB_JOBINDEX": "3",
    "LSB_JOBINDEX_END": "7",
    "SGE_TASK_ID": "4",
}

READ = [
    ("1/1", {}, Shard(1, 1)),
    ("3/8", SLURM, Shard(3, 8)),  # what is said counts
    ("auto", SLURM, Shard(7, 8)),
    (
        "auto",
        SLURM
        | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_ID": "0"},
        Shard(1, 8),
    ),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_MAX": "15", "SLURM_ARRAY_TASK_STEP": "2"}, Shard(4, 8)),
    (
        "auto",
        {
            name: SLURM[name]
            for name in ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
        },
        Shard(7, 8),
    ),
    (
        "auto/8",
        SLURM
        | {"SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_MAX": "7", "SLURM_ARRAY_TASK_COUNT": "1"},
        Shard(7, 8),
    ),  # again
    ("auto/16", {"JOB_COMPLETION_INDEX": "0"}, Shard(1, 16)),
    ("auto/16", {"JOB_COMPLETION_INDEX": "15"}, Shard(16, 16)),
]
REFUSED = [
    ("0/8", {}, "no such shard", "1/8 to 8/8"),
    ("9/8", {}, "no such shard", "1/8 to 8/8"),
    ("1/0", {}, "the number of shards is 0"),
    *(
        (spec, {}, "expected: i/n")
        for spec in ("", "3", "auto/", "/8", "-1/8", "1/8/2", "1.5/8", "Auto", "²/8")
    ),
    (
        "auto",
        {},
        "not part of a Slurm or Kubernetes job array",
        "SLURM_ARRAY_TASK_ID",
        "JOB_COMPLETION_INDEX",
    ),
    ("auto/8", {}, "--shard $INDEX/$COUNT"),
    ("auto", NO_ARRAY, "--shard $INDEX/$COUNT"),
    (
        "auto",
        {"JOB_COMPLETION_INDEX": "2"},
        "Kubernetes does not give the number of jobs",
        "0 to n - 1",
    ),
    ("auto/16", {"JOB_COMPLETION_INDEX": "16"}, "JOB_COMPLETION_INDEX is 16", "expected: 0 to 15"),
    (
        "auto/8",
        SLURM | {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_ID": "0"},
        "SLURM_ARRAY_TASK_ID is 0",
        "expected: 1 to 8",
    ),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_ID": "seven"}, "SLURM_ARRAY_TASK_ID is 'seven'"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_COUNT": "4"}, "array has gaps", "1 to 8, step 1, 4 jobs"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "4"}, "array has gaps"),
    ("auto", SLURM | {"SLURM_ARRAY_TASK_STEP": "0"}, "array has gaps", "step 0"),
    (
        "auto",
        SLURM | {"SLURM_ARRAY_TASK_MIN": "7", "SLURM_ARRAY_TASK_COUNT": "2"},
        "does not start at 0 or 1",
        "re-run",
    ),
]


@pytest.mark.parametrize(("spec", "environ", "expected"), READ, ids=str)
def test_a_shard_is_what_the_flag_or_the_job_array_says(spec, environ, expected):
    assert parse_shard(spec, environ) == expected


@pytest.mark.parametrize(
    ("spec", "environ", "says"),
    [(spec, environ, says) for spec, environ, *says in REFUSED],
    ids=str,
)
def test_what_is_no_shard_is_refused(spec, environ, says):
    with pytest.raises(UsageProblem) as refused:
        parse_shard(spec, environ)
    for text in says:
        assert text in str(refused.value)


IDS = st.one_of(
    st.tuples(st.integers(0, 20_000), st.integers(1, 60_000)).map(
        lambda ends: range(ends[0], sum(ends))
    ),
    st.sets(st.integers(0, 40_000), min_size=1, max_size=400).map(
        lambda ids: np.array(sorted(ids))
    ),
)


@given(IDS, st.integers(1, 40))
def test_each_example_is_in_one_shard_cut_by_the_grid_and_evenly(ids, count):
    shards = [list(Shard(number, count).of(ids)) for number in range(1, count + 1)]
    assert [example for shard in shards for example in shard] == list(ids)
    for before, after in itertools.pairwise(shards):
        if before and after:
            assert any(
                before[-1] < line <= after[0]
                for line in range(after[0] // FINE * FINE, after[0] + 1, FINE)
            )
    most = max(
        len(ids) / count / 4, FINE
    )  # of the grid that was taken: half of it can be lacking or too much at either end
    assert all(abs(len(shard) - len(ids) / count) <= most + 1 for shard in shards)


def test_large_shards_are_cut_where_units_begin():
    shards = [Shard(number, 3).of(range(100, 100_000)) for number in (1, 2, 3)]
    assert [shard.start for shard in shards] == [100, 32768, 65536]
    assert [
        shard.start for shard in (Shard(number, 3).of(range(14_000)) for number in (1, 2, 3))
    ] == [0, 5120, 9216]


def test_a_place_is_found_without_torch():
    code = "import sys; from influence_cli.parallel.shards import parse_shard; parse_shard('1/2', {}); print({'torch', 'numpy'} & {*sys.modules})"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "set()\n"
    )
