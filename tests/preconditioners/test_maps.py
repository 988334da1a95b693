"""The curvature of one parameter against dense matrices, where the approximation is exact."""

import itertools

import pytest
import torch

from influence_cli.gradients.forms import Dense, Factors, Form, Projected
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.preconditioners.block_maps import BlockMap, map_of_moments
from influence_cli.preconditioners.block_statistics import BlockDiagonal, BlockMoments
from influence_cli.preconditioners.kinds import KINDS

DAMPING = 0.03


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fit(form: Form, kind: str) -> BlockMap:
    """In two parts, as units come."""
    half = len(form) // 2
    parts = [form.take(torch.arange(half)), form.take(torch.arange(half, len(form)))]
    moments = BlockMoments.start(form, KINDS[kind].basis)
    for part in parts:
        moments.add(part)
    block = map_of_moments(moments)
    if not KINDS[kind].is_corrected or moments.basis == "full":
        return block
    diagonal = BlockDiagonal(block.left, block.right, block.shape)
    for part in parts:
        diagonal.add(part)
    return BlockMap(block.left, block.right, diagonal.total / diagonal.examples)


def dense_solution(fisher_DD, values):
    identity = torch.eye(len(fisher_DD), dtype=torch.float64)
    return torch.linalg.solve(fisher_DD + DAMPING * identity, values.T).T


def empirical_fisher(form):
    values = form.dense().values
    return values.T @ values / len(values)


def agrees(block, form, fisher_DD):
    queries = normal(3, fisher_DD.shape[0], seed=9)
    assert torch.allclose(
        block.solve(queries, DAMPING), dense_solution(fisher_DD, queries), rtol=1e-9, atol=1e-10
    )


FORMS = {
    "dense weight": Dense((3, 4), normal(7, 12)),
    "factors": Factors((3, 4), normal(7, 1, 3), normal(7, 1, 4, seed=1)),
    "factors over positions": Factors((3, 4), normal(7, 5, 3), normal(7, 5, 4, seed=1)),
    "convolution": Dense((3, 2, 1, 2), normal(7, 12)),
    "vector": Dense((5,), normal(7, 5)),
    "projected": Projected((6,), normal(7, 6)),
    "embedding": EmbeddingRows((5, 2), torch.tensor([0, 3, 1, 4]), normal(4, 2), torch.tensor([0, 2, 2, 4])),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_fisher_is_the_dense_matrix(name):
    agrees(fit(FORMS[name], "fisher"), FORMS[name], empirical_fisher(FORMS[name]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["vector", "projected"])
def test_vectors_have_their_full_matrix_in_every_kind(name, kind):
    agrees(fit(FORMS[name], kind), FORMS[name], empirical_fisher(FORMS[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_exact_where_inputs_and_output_gradients_are_independent(kind):
    """All pairs of 3 inputs and 4 output gradients: E[bb^T x aa^T] is a Kronecker product."""
    pairs = list(itertools.product(normal(4, 3), normal(3, 5, seed=1)))
    form = Factors(
        (3, 5),
        torch.stack([b for b, _ in pairs])[:, None],
        torch.stack([a for _, a in pairs])[:, None],
    )
    agrees(fit(form, kind), form, empirical_fisher(form))


@pytest.mark.parametrize("kind", ["shampoo", "ekfac", "fisher"])
def test_multiples_of_one_matrix_of_rank_one_are_exact(kind):
    scales = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    form = Factors(
        (3, 4),
        (scales[:, None] * normal(3))[:, None],
        normal(4, seed=1).expand(4, 4)[:, None].clone(),
    )
    agrees(fit(form, kind), form, empirical_fisher(form))


@pytest.mark.parametrize(
    "name", ["dense weight", "factors", "factors over positions", "convolution", "embedding"]
)
def test_ekfac_has_the_exact_diagonal_in_its_basis(name):
    form = FORMS[name]
    block = fit(form, "ekfac")
    left = torch.eye(block.shape[0], dtype=torch.float64) if block.left is None else block.left
    basis = torch.kron(left.contiguous(), block.right.contiguous())
    expected = (basis.T @ empirical_fisher(form) @ basis).diagonal()
    assert torch.allclose(block.eigenvalues.flatten(), expected, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["dense weight", "factors", "factors over positions", "convolution"]
)
def test_shampoo_is_the_product_of_both_second_moments(name):
    form = FORMS[name]
    grads = form.dense().values.view(7, 3, 4)
    left, right = (grads @ grads.mT).mean(0), (grads.mT @ grads).mean(0)
    agrees(fit(form, "shampoo"), form, torch.kron(left, right) / left.trace())


def test_kfac_leaves_padding_out_of_the_mean_over_positions():
    left, right = normal(6, 4, 3), normal(6, 4, 2, seed=1)
    left[:, 2:] = 0  # padded positions have inputs, and no output gradients
    block = fit(Factors((3, 2), left, right), "kfac")
    assert torch.allclose(
        (block.right * block.eigenvalues.sum(0)) @ block.right.T / block.eigenvalues.sum(),
        (right[:, :2].flatten(0, 1).T @ right[:, :2].flatten(0, 1)) / right[:, :2].square().sum(),
    )


@pytest.mark.parametrize("kind", ["shampoo", "ekfac"])
@pytest.mark.parametrize("name", ["embedding", "long dense weight"])
def test_a_side_of_tokens_and_a_long_side_keep_their_diagonal(name, kind, monkeypatch):
    from influence_cli.preconditioners import block_statistics

    monkeypatch.setattr(block_statistics, "LONGEST_SIDE", 3)
    form = FORMS["embedding"] if name == "embedding" else Dense((5, 2), normal(3, 10))
    block = fit(form, kind)
    assert block.left is None and block.right is not None
    grads = form.dense().values.view(3, 5, 2)
    if kind == "shampoo":
        left, right = (grads @ grads.mT).mean(0).diagonal().diag(), (grads.mT @ grads).mean(0)
        agrees(block, form, torch.kron(left, right) / left.trace())
    else:
        expected = (grads @ block.right).square().mean(0)
        assert torch.allclose(block.eigenvalues, expected)


def test_eigenvalues_are_never_below_zero():
    form = Dense((2, 3), normal(1, 6).expand(4, 6).clone())  # rank one: the others are rounding
    for kind in KINDS:
        assert (fit(form, kind).eigenvalues >= 0).all()


def test_gradients_that_are_rounding_error_stay_small():
    """Of two parameters one has gradients of 1e-9 of the other's: its scores must not be as large."""
    from influence_cli.cache.gradient_rows import GradientRows
    from influence_cli.preconditioners.apply import Preconditioner
    from influence_cli.preconditioners.blocks import Block

    forms = {"real": Dense((5,), normal(40, 5)), "noise": Dense((5,), 1e-9 * normal(40, 5, seed=1))}
    maps = {Block(name): fit(form, "fisher") for name, form in forms.items()}
    none = torch.zeros(40)
    rows = GradientRows(torch.arange(40).numpy(), none, none, {}, dict(forms))
    mapped = Preconditioner.of(maps, None).apply(rows)
    scores = {name: forms[name].dot(mapped.forms[name]).abs().max() for name in forms}
    assert scores["noise"] < 1e-6 * scores["real"]
