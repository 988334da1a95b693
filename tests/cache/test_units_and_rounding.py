"""What decides whether cached rows are the run's: the rows of a unit, and the allowed rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.identity import Settings, check_rows_agree
from influence_cli.cache.store import Store
from influence_cli.cache.unit_file import Unit
from influence_cli.cache.unit_index import UnitIndex
from influence_cli.errors import CacheError
from influence_cli.gradients.forms import Dense


def test_a_unit_finds_the_rows_of_its_examples():
    unit = Unit(Path("c"), "u", ("a",), "values", "d", 4, 8)
    assert unit.find_rows(np.array([3, 4, 7, 8])).tolist() == [-1, 0, 3, -1]
    some = unit.keep_examples(np.array([False, True, False, True]))
    assert some.find_rows(np.array([4, 5, 6, 7, 9])).tolist() == [-1, 1, -1, 3, -1]
    none = unit.keep_examples(np.zeros(4, bool))
    assert none.find_rows(np.array([4, 5])).tolist() == [-1, -1]


@pytest.mark.parametrize(
    ("precision", "storage", "rounding"),
    [
        # batches of other sizes round differently: the square root of the precision, times 4
        (torch.float64, torch.float64, 4 * 2**-26),
        (torch.float32, torch.float32, 4 * 2**-11.5),
        # of half precision the square root would be 9 %
        (torch.bfloat16, torch.float32, 8 * 2**-7),
        (torch.float16, torch.float32, 8 * 2**-10),
        # a number that is stored in fewer bits may be a few steps off
        (torch.float32, torch.int8, 4 / 127),
    ],
    ids=str,
)
def test_the_allowed_rounding_follows_from_both_number_formats(precision, storage, rounding):
    assert Settings(precision, storage).rounding == pytest.approx(rounding)


def rows(losses, values) -> GradientRows:
    form = Dense((2,), torch.tensor(values))
    ids = np.arange(len(losses))
    digests = torch.zeros(len(losses), dtype=torch.int64)
    return GradientRows(ids, torch.tensor(losses), digests, {"a": form.sqnorm()}, {"a": form})


VALUES = [[3.0, 4.0], [0.0, 1e-3]]
STORED = rows([-2.0, -1.0], VALUES)


@pytest.mark.parametrize(
    ("losses", "values", "differs"),
    [
        ([-2.0, -1.0], VALUES, None),
        (
            [-2.0, -1.0015],
            VALUES,
            None,
        ),  # losses may be below 0: 0.2 % of the largest size is allowed
        ([-2.0, -1.0021], VALUES, "losses differ"),
        ([-2.0, -1.0], [[3.0, 4.0], [0.0, 5.9e-3]], None),  # 0.1 % of the largest gradient
        ([-2.0, -1.0], [[3.0, 4.0], [0.0, 6.1e-3]], "recomputed gradients differ"),
        ([-2.0, -1.0], [[4.0, 3.0], [0.0, 1e-3]], "recomputed gradients differ"),  # of equal norm
    ],
)
def test_rows_agree_up_to_rounding(losses, values, differs):
    def compare():
        check_rows_agree(STORED, rows(losses, values), 1e-3, "step 1", "train", Path("c"))

    if differs is None:
        compare()
        return
    with pytest.raises(CacheError, match=differs):
        compare()


def test_only_a_unit_with_gaps_lists_its_examples(tmp_path):
    store = Store(tmp_path / "c")
    all_ids, some = np.arange(4, 8), np.array([4, 6])
    complete, with_gaps = (
        store.unit_for(store.folder / "x", ["a"], "norms", "d", 4, 8, ids)
        for ids in (all_ids, some)
    )
    assert complete.ids is None
    assert with_gaps.ids.tolist() == [4, 6]
    assert complete.name != with_gaps.name


def test_an_index_covers_only_what_its_complete_units_hold():
    a = Unit(Path("c"), "u", ("a",), "values", "d", 0, 8)
    b = Unit(Path("c"), "v", ("b",), "norms", "d", 0, 4)
    index = UnitIndex([a, b, a.keep_examples(np.arange(8) < 4)])
    low, high = np.array([0, 4, 2]), np.array([4, 8, 9])
    assert index.covers(["a"], "values", low, high).tolist() == [True, True, False]
    assert index.covers(["a"], "norms", low, high).tolist() == [True, True, False]
    assert index.covers(["b"], "norms", low, high).tolist() == [True, False, False]
    assert not index.covers(["b"], "values", low, high).any()
    assert not index.covers(["a", "b"], "norms", low, high).any()
