"""Correlations where some or all queries have none."""

from types import SimpleNamespace

import numpy as np
import pytest

from influence_cli.evaluate.agreement import agreement_rows, root_mean_square, spread


class Notes(list):
    note = list.append


def table(predicted, effects):
    notes = Notes()
    run = SimpleNamespace(query=SimpleNamespace(label=lambda query: f"label {query}"))
    request = SimpleNamespace(queries=range(len(effects[0])), seed=0)
    source = SimpleNamespace(run=run, reporter=notes)
    noise = np.array([3.0, 4.0])
    rows = list(agreement_rows(source, request, {"dve": predicted}, effects, noise))
    return rows, notes


RISING = np.array([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0]])


def test_equal_effects_have_no_correlation_and_a_note_says_so():
    (first, second, mean, pooled), notes = table(RISING, np.array([[1, 5.0], [1, 6], [1, 8]]))
    assert first[:4] == ("dve", "0", None, None)
    assert second[2] == 1.0
    assert 0.9 < second[3] < 1
    assert mean[2:4] == second[2:4]  # over the queries that have one
    assert "1 of 2 queries have no correlation" in notes[0]
    assert pooled[2] is not None


def test_no_correlation_at_all_leaves_the_means_empty():
    rows, notes = table(RISING, np.ones((3, 2)))
    assert [row[2:4] for row in rows] == [(None, None)] * 4
    assert "2 of 2 queries have no correlation" in notes[0]
    assert len(notes) == 1


def test_the_noise_is_a_mean_and_pooled_a_root_mean_square():
    rows, _ = table(RISING, RISING)
    assert rows[2][6] == 3.5
    assert rows[3][6] == pytest.approx(np.sqrt(12.5))
    assert rows[2][5] == pytest.approx((spread(RISING[:, 0]) + spread(RISING[:, 1])) / 2)


@pytest.mark.parametrize("size", [1.0, 1e300, 1e-300, 0.0])
def test_sizes_neither_overflow_nor_underflow(size):
    values = np.array([3.0, -4.0]) * size
    assert root_mean_square(values) == pytest.approx(np.sqrt(12.5) * size, rel=1e-12)
    assert float(spread(values)) == pytest.approx(3.5 * size, rel=1e-12)
