"""One projection of all parameters: inner products in expectation, and without loss where K is
large enough.
"""

import pytest
import torch

from influence_cli.gradients.forms import Dense, Factors
from influence_cli.gradients.joint_projection import JointProjection
from influence_cli.gradients.projection import Projection

SHAPES = {"bias": (3,), "weight": (6, 5), "other": (4, 9)}


def random_forms(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: Dense(shape, torch.randn(count, torch.Size(shape).numel(), generator=generator))
        for name, shape in SHAPES.items()
    }


def products(forms):
    rows = torch.cat([form.values.double() for form in forms.values()], dim=1)
    return rows @ rows.T


def test_enough_numbers_keep_all_gradients():
    forms = random_forms(7)
    joint = JointProjection.of(SHAPES, None, 69, 0)
    assert joint.numbers == 3 + 30 + 36
    features = joint.features(forms)
    assert torch.allclose(features @ features.T, products(forms), rtol=1e-12, atol=1e-12)


def test_inner_products_are_those_of_the_gradients_in_expectation():
    forms, seeds = random_forms(4), 400
    grams = torch.stack([
        features @ features.T
        for seed in range(seeds)
        for features in [JointProjection.of(SHAPES, None, 16, seed).features(forms)]
    ])  # fmt: skip
    error = (grams.mean(0) - products(forms)).abs()
    assert bool((error < 5 * grams.std(0) / seeds**0.5).all())
    assert bool((grams.std(0).diagonal() > 0).all())


def test_few_numbers_have_places_of_their_own():
    joint = JointProjection.of(SHAPES, None, 16, 3)
    at, signs = joint.places["bias"]
    assert len(set(at.tolist())) == 3
    assert bool((signs.abs() == 1).all())
    forms = random_forms(5)
    features = joint.features(forms, ["bias"])
    assert torch.equal(features[:, at] * signs, forms["bias"].values.double())
    assert int((features != 0).sum()) == 15


@pytest.mark.parametrize("kind", ["tensor-sketch", "sparse", "khatri-rao", "kronecker"])
def test_projected_gradients_give_the_features_of_exact_ones(kind):
    projection, forms = Projection(kind, 16, 5), random_forms(6)
    joint = JointProjection.of(SHAPES, projection, 1, 0)
    stored = {name: projection(name, form)[1] for name, form in forms.items()}
    assert joint.numbers == 16
    assert torch.equal(joint.features(stored), joint.features(forms))


def test_factors_are_projected_without_their_matrix():
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(4, 2, n, generator=generator) for n in (6, 5))
    factors = Factors((6, 5), left, right)
    joint = JointProjection.of({"weight": (6, 5)}, None, 8, 0)
    dense = joint.features({"weight": factors.dense()})
    torch.testing.assert_close(joint.features({"weight": factors}), dense, rtol=1e-4, atol=1e-5)


def test_a_seed_gives_the_same_numbers_again_and_another_seed_others():
    forms = random_forms(3)
    first, again, other = (
        JointProjection.of(SHAPES, None, 16, seed).features(forms) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
