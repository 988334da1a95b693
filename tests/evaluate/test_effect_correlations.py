"""Correlations where some or all queries have none."""

import numpy as np
import pytest

from influence_cli.evaluate.effect_correlations import FigureMaker, root_mean_square, spread


class Notes(list):
    note = list.append


def correlations(predicted, effects):
    notes = Notes()
    maker = FigureMaker(range(len(effects[0])), "3 trainings", 0)
    figures = [*maker.correlations("dve", predicted, effects, notes)]
    figures += maker.pooled("dve", predicted, effects)
    return {(figure.name, figure.part): figure for figure in figures}, notes


RISING = np.array([[1.0, 1.0], [2.0, 4.0], [3.0, 9.0]])


def test_equal_effects_have_no_correlation_and_a_note_says_so():
    figures, notes = correlations(RISING, np.array([[1, 5.0], [1, 6], [1, 8]]))
    assert figures["spearman", "0"].value is None
    assert figures["spearman", "1"].value == 1.0
    assert 0.9 < figures["pearson", "1"].value < 1
    for name in ("spearman", "pearson"):  # over the queries that have one
        mean = figures[name, "all"]
        assert (mean.value, mean.count) == (figures[name, "1"].value, 1)
    assert "1 of 2 queries have no correlation" in notes[0]
    assert figures["pooled-spearman", "all"].value is not None


def test_no_correlation_at_all_leaves_the_means_empty():
    figures, notes = correlations(RISING, np.ones((3, 2)))
    assert all(figure.value is None for figure in figures.values())
    assert "2 of 2 queries have no correlation" in notes[0]
    assert len(notes) == 1


def test_effect_and_noise_are_means_over_queries():
    maker = FigureMaker([4, 7], "", 0)
    figures = list(maker.sizes(RISING, np.array([3.0, 4.0])))
    assert [figure.part for figure in figures] == ["4", "7", "all"] * 2
    assert figures[2].value == pytest.approx((spread(RISING[:, 0]) + spread(RISING[:, 1])) / 2)
    assert figures[5].value == 3.5
    assert figures[5].low == 3.0
    assert figures[5].high == 4.0


@pytest.mark.parametrize("size", [1.0, 1e300, 1e-300, 0.0])
def test_sizes_neither_overflow_nor_underflow(size):
    values = np.array([3.0, -4.0]) * size
    assert root_mean_square(values) == pytest.approx(np.sqrt(12.5) * size, rel=1e-12)
    assert float(spread(values)) == pytest.approx(3.5 * size, rel=1e-12)
