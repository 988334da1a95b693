"""Single functions of the rules. A wrong rule falls back to torch.func, so that scores do not show it."""

import pytest
import torch

from influence_cli.errors import GradientError
from influence_cli.gradients.convolution_rules import sum_over_places
from influence_cli.gradients.double_backward import explained
from influence_cli.gradients.embedding_capture import mask_of, without_zeros
from influence_cli.gradients.example_axes import MIXED, Axis, find_axis
from influence_cli.gradients.layer_rules import plain_sum
from influence_cli.gradients.sparse_forms import EmbeddingRows

MATRIX, VECTOR = torch.zeros(2, 2), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "fits"),
    [
        ({}, True),
        ({"beta": 1, "alpha": 1.0}, True),
        ({"beta": 2}, False),
        ({"alpha": 0.5}, False),
        ({"weight": VECTOR}, False),
        ({"input": VECTOR}, False),
    ],
)
def test_the_rule_of_a_matrix_product_is_of_plain_sums(call, fits):
    assert plain_sum({"weight": MATRIX, "input": MATRIX, **call}) == fits


def test_the_gradient_of_a_bias_sums_the_rows_and_places_of_an_example():
    g = torch.arange(24.0).view(4, 2, 3)  # two rows for each of two examples, two channels
    expected = torch.stack([g[:2].sum((0, 2)), g[2:].sum((0, 2))])
    assert torch.equal(sum_over_places(g, 2).dense().values, expected)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("derivative for aten::_embedding_bag_backward is not implemented", GradientError),
        ("Double backward is not supported for this operation", GradientError),
        ("shapes do not match", RuntimeError),
    ],
)
def test_only_a_missing_second_derivative_is_explained(message, kind):
    assert type(explained(RuntimeError(message))) is kind


def test_words_to_which_no_position_contributed_are_dropped():
    rows = EmbeddingRows(
        (9, 2),
        torch.tensor([1, 4, 2, 7, 8]),
        torch.tensor([[0.0, 0], [1, 1], [0, 3], [0, 0], [1, 0]]),
        torch.tensor([0, 2, 4, 4, 5]),
    )
    kept = without_zeros(rows)
    assert kept.ids.tolist() == [4, 2, 8]
    assert kept.values.tolist() == [[1, 1], [0, 3], [1, 0]]
    assert kept.offsets.tolist() == [0, 1, 2, 2, 3]


def test_a_mask_counts_if_it_has_the_shape_of_the_ids():
    ids, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3)
    assert mask_of({"attention_mask": mask}, ids) is mask
    assert mask_of({"attention_mask": mask[:, :2]}, ids) is None
    assert mask_of({"attention_mask": [1]}, ids) is None
    assert mask_of({}, ids) is mask_of((mask,), ids) is None


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("inner", [False, True])
def test_values_of_any_sign_show_whether_examples_vary_fastest(inner, sign):
    torch.manual_seed(0)
    two = sign * torch.rand(2, 3, 4)  # examples, positions
    twice = torch.cat([two, two])
    one, both = (
        (values.transpose(0, 1) if inner else values).flatten(0, 1) for values in (two, twice)
    )
    assert find_axis(both, one.shape, 2) == Axis(0, inner)
    assert find_axis(sign * torch.rand(12, 4), one.shape, 2) == MIXED
