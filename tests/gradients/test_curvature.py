"""Exact curvature against autograd's own second derivatives, one example at a time, in float64."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import weight_norm

from influence_cli.errors import GradientError
from influence_cli.gradients.batches import to
from influence_cli.gradients.curvature import Curvature, LossFunctions
from influence_cli.gradients.curvature_check import check_curvature
from influence_cli.gradients.double_backward import PlainWeightNorm
from tests import reference
from tests.cases import (
    CASES,
    Case,
    TiedForm,
    classified,
    labelled,
    numbers,
    squared,
    tokens,
    with_statistics,
)

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.0, 0.1], dtype=torch.float64)


class SparseTied(TiedForm):
    def __init__(self) -> None:
        super().__init__()
        self.embedding.sparse = self.position.sparse = True


def mean_entropy(out: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(out.transpose(1, 2), ids.roll(-1, 1), reduction="none").mean(1)


def next_token(model: nn.Module, ids: Tensor) -> Tensor:
    return mean_entropy(model(ids), ids)


class CubeBackward(torch.autograd.Function):
    """Its backward asks for numbers, which vmap does not give."""

    @staticmethod
    def forward(ctx, x, grad):
        ctx.save_for_backward(x, grad)
        return 3 * x**2 * grad

    @staticmethod
    def backward(ctx, along):
        x, grad = ctx.saved_tensors
        assert float(along.detach().abs().sum()) >= 0
        return 6 * x * grad * along, 3 * x**2 * along


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return CubeBackward.apply(ctx.saved_tensors[0], grad)


class CubeOnce(Cube):
    backward = staticmethod(
        once_differentiable(lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad)
    )


class Forgetful(Cube):
    """Its backward is linear in what comes back, and takes what it saved for constant."""

    backward = staticmethod(lambda ctx, grad: 3 * ctx.saved_tensors[0].detach() ** 2 * grad)


def mlp(*more: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), *more, nn.Linear(6, 3))


KINDS = {name: case for name, case in CASES.items() if name != "embedding-bag"} | {
    "loss-linear-in-the-parameters": Case(
        lambda: nn.Linear(4, 3), numbers(4), lambda model, x: model(x).sum(1)
    ),
    "no-vmap": Case(
        lambda: nn.Linear(4, 3), numbers(4), lambda model, x: Cube.apply(model(x)).sum(1)
    ),
    "pooled": Case(
        lambda: nn.Sequential(
            *with_statistics()[:3], nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        ),
        labelled(3, 8, 8),
        classified,
    ),
    "tied-tokens": Case(TiedForm, tokens(7), next_token),
    "tied-sparse": Case(SparseTied, tokens(7), next_token),
    "layernorm-classified": Case(mlp(nn.LayerNorm(6), nn.Tanh()), labelled(4), classified),
    "rmsnorm": Case(mlp(nn.RMSNorm(6), nn.SiLU()), labelled(4), classified),
    "groupnorm": Case(mlp(nn.GroupNorm(2, 6), nn.Softplus()), labelled(4), classified),
    "weight-norm": Case(
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)),
        labelled(4),
        classified,
    ),
}


def made(
    case: Case, names: Sequence[str] | None = None
) -> tuple[nn.Module, list[str], Any, list[Any]]:
    """(model, names of its trained parameters, batch, batches of one)."""
    torch.manual_seed(0)
    model, items = case.model().double().eval(), case.examples()
    batch, *singles = (
        to(case.collate(chosen), torch.device("cpu"), torch.float64)
        for chosen in [items, *([item] for item in items)]
    )
    return (
        model,
        list(names or (name for name, p in model.named_parameters() if p.requires_grad)),
        batch,
        singles,
    )


def directions(model: nn.Module, names: Sequence[str], count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(
            count, model.get_parameter(name).numel(), generator=generator, dtype=torch.float64
        )
        for name in names
    }


def curved(
    model: nn.Module, names: Sequence[str], functions: LossFunctions, batch: Any, most: int = 1
) -> Curvature:
    return Curvature(model, names, functions, batch, WEIGHTS.clone(), most)


class Reference:
    """Per example: gradients (B, D) and, with each direction, (K, D) second derivatives, as a plain
    function of the parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        loss: Callable[..., Tensor],
        singles: Sequence[Any],
    ) -> None:
        self.names, self.loss, self.singles = list(names), loss, singles
        self.model = copy.deepcopy(model)
        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = False
        self.theta = tuple(self.model.get_parameter(name).detach() for name in names)

    def function(self, quantity: Callable[..., Tensor], single: Any) -> Callable[..., Tensor]:
        def of(*theta: Tensor) -> Tensor:
            placed = dict(zip(self.names, theta, strict=True))
            with sdpa_kernel(SDPBackend.MATH), PlainWeightNorm():
                return quantity(lambda x: functional_call(self.model, placed, (x,)), single)

        return of

    def gradients(self) -> dict[str, Tensor]:
        rows = reference.gradients(self.model, self.loss, self.singles)
        return {name: rows[name].reshape(len(self.singles), -1) for name in self.names}

    def hessian(self, u: dict[str, Tensor]) -> dict[str, Tensor]:
        def total(*theta: Tensor) -> Tensor:
            return sum(
                weight * self.function(self.loss, single)(*theta).sum()
                for weight, single in zip(WEIGHTS, self.singles, strict=True)
            )

        along = [
            tuple(
                u[name][k].view_as(value)
                for name, value in zip(self.names, self.theta, strict=True)
            )
            for k in range(3)
        ]
        columns = [functional.hvp(total, self.theta, direction)[1] for direction in along]
        return {
            name: torch.stack([column[i].flatten() for column in columns])
            for i, name in enumerate(self.names)
        }

    def gauss_newton(
        self, u: dict[str, Tensor], outputs: Callable[..., Tensor], after: Callable[..., Tensor]
    ) -> dict[str, Tensor]:
        """J^T S J u with both matrices whole."""
        flat = torch.cat([u[name] for name in self.names], dim=1)
        total = torch.zeros_like(flat)
        for weight, single in zip(WEIGHTS, self.singles, strict=True):
            of = self.function(outputs, single)
            out = of(*self.theta).detach()
            J = torch.cat(
                [part.reshape(out.numel(), -1) for part in functional.jacobian(of, self.theta)],
                dim=1,
            )
            S = functional.hessian(lambda o, single=single: after(o, single).sum(), out).reshape(
                out.numel(), -1
            )
            total += weight * flat @ J.T @ S @ J
        return dict(
            zip(
                self.names, total.split([value.numel() for value in self.theta], dim=1), strict=True
            )
        )


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """1e-9 of each parameter's; of a thousandth of the whole where those are only rounding (a key's
    bias before softmax).
    """
    assert list(actual) == list(expected)
    total_norm = torch.cat(list(expected.values()), dim=-1).norm()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert (actual[name] - value).norm() <= 1e-9 * max(
            float(value.norm()), 1e-3 * float(total_norm)
        ), name


@pytest.mark.parametrize("name", KINDS)
def test_products_and_gradients_equal_autograd_one_by_one(name):
    case = KINDS[name]
    model, names, batch, singles = made(case)
    slow, u = Reference(model, names, case.loss, singles), directions(model, names)
    g, pull = slow.gradients(), slow.hessian(u)
    used = [name for name in names if name != "unused"]
    products = {name: g[name] @ u[name].T for name in used}
    for most in (1, 2, 3):
        curvature = curved(model, names, LossFunctions(case.loss), batch, most)
        assert curvature.names == used
        assert_near(curvature.gradient(), {name: WEIGHTS @ g[name] for name in used})
        actual, along = curvature.through(u)
        assert_near(actual, {"": sum(products.values())})
        assert_near(along, {name: pull[name] for name in used})
        by_name, again = curvature.through(u, by_parameter=True)
        assert_near(by_name, products)
        assert_near({"": sum(by_name.values())}, actual)
        assert_near(again, along)
        assert name != "no-vmap" or curvature.at_once == 1
    assert all(p.grad is None for p in model.parameters())


PARTS = {  # case, loss from outputs, is it the Hessian too
    "classes": (CASES["mlp"], lambda out, z: F.cross_entropy(out, z[1], reduction="none"), False),
    "tokens": (KINDS["tied-sparse"], mean_entropy, False),
    "attention": (CASES["sdpa"], lambda out, z: out.flatten(1).square().sum(1) / 2, False),
    "weight-norm": (
        KINDS["weight-norm"],
        lambda out, z: F.cross_entropy(out, z[1], reduction="none"),
        False,
    ),
    "linear": (
        Case(lambda: nn.Linear(4, 3), numbers(4)),
        lambda out, z: out.square().sum(1) / 2,
        True,
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_gauss_newton_equals_its_explicit_matrix(name):
    case, after, same = PARTS[name]
    model, names, batch, singles = made(case)
    slow, u = Reference(model, names, case.loss, singles), directions(model, names)

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0] if isinstance(batch, list) else batch)

    g, pull = slow.gradients(), slow.gauss_newton(u, outputs, after)
    difference = sum(float((pull[name] - value).norm()) for name, value in slow.hessian(u).items())
    assert (difference < 1e-9) == same
    for most in (1, 2, 3):
        curvature = curved(model, names, LossFunctions(case.loss, outputs, after), batch, most)
        assert_near(curvature.gradient(), {name: WEIGHTS @ g[name] for name in names})
        actual, along = curvature.through(u, by_parameter=True)
        assert_near(actual, {name: g[name] @ u[name].T for name in names})
        assert_near(along, pull)
        assert_near(curvature.through(u)[0], {"": sum(actual.values())})


@pytest.mark.parametrize("freeze", [False, True])
def test_a_subset_of_the_parameters_has_its_block_of_the_hessian(freeze):
    case, chosen = CASES["mlp"], ["2.weight", "0.bias"]
    model, names, batch, singles = made(case, chosen)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not freeze or name in chosen)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    slow, u = Reference(model, names, case.loss, singles), directions(model, names)
    curvature = curved(model, names, LossFunctions(case.loss), batch, 3)
    assert curvature.names == chosen
    actual, pull = curvature.through(u, by_parameter=True)
    assert_near(actual, {name: g @ u[name].T for name, g in slow.gradients().items()})
    assert_near(pull, slow.hessian(u))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("most", [1, 3])
def test_a_layer_without_a_second_derivative_is_named(most):
    model, names, batch, _ = made(CASES["embedding-bag"])
    with pytest.raises(GradientError, match=r"embedding_bag") as raised:
        curved(model, names, LossFunctions(squared), batch, most).through(directions(model, names))
    assert "--method dve" in str(raised.value)


def test_a_function_that_is_differentiable_once_is_refused():
    model, names, batch, _ = made(Case(lambda: nn.Linear(4, 3), numbers(4)))
    with pytest.raises(GradientError):
        curved(
            model, names, LossFunctions(lambda model, x: CubeOnce.apply(model(x)).sum(1)), batch
        ).through(directions(model, names))


@pytest.mark.parametrize(
    ("functions", "says"),
    [
        (LossFunctions(lambda model, x: squared(model, x).sum()), "returned a scalar"),
        (
            LossFunctions(squared, lambda model, x: model(x), lambda out, x: out.square().sum(1)),
            r"outputs\(\)\) is not loss\(\)",
        ),
        (
            LossFunctions(
                squared, lambda model, x: model(x).detach(), lambda out, x: out.square().sum(1) / 2
            ),
            "not differentiable",
        ),
        (
            LossFunctions(squared, lambda model, x: model(x), lambda out, x: x.square().sum(1)),
            "not differentiable",
        ),
        (
            LossFunctions(lambda model, x: Forgetful.apply(model(x)).sum(1)),
            "differ from finite differences",
        ),
        (
            LossFunctions(
                squared, lambda model, x: (model(x),), lambda out, x: out[0].square().sum(1) / 2
            ),
            "returned a tuple",
        ),
        (
            LossFunctions(
                squared, lambda model, x: model(x), lambda out, x: out.square().sum() / 2
            ),
            r"loss_from_outputs\(\) returned a scalar",
        ),
    ],
)
def test_wrong_functions_are_refused(functions, says):
    model, names, batch, _ = made(Case(lambda: nn.Linear(4, 3), numbers(4)))
    with pytest.raises(GradientError, match=says):
        check_curvature(model, names, functions, batch, 5)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_passes_the_comparison_before_work(name):
    case = KINDS[name]
    model, names, batch, _ = made(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    check_curvature(model, names, LossFunctions(case.loss), batch, 5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_torchs_settings_are_as_before(fails):
    model, names, batch, _ = made(KINDS["tied-sparse"])
    model.mix.bias.requires_grad_(False)
    names.remove("mix.bias")

    def state():
        cuda, flags = torch.backends.cuda, [p.requires_grad for p in model.parameters()]
        sdpa = [
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ]
        return (
            sdpa,
            flags,
            torch.backends.cudnn.enabled,
            torch.is_grad_enabled(),
            model.embedding.sparse,
            model.position.sparse,
        )

    def loss(model, ids):
        if fails:
            raise ValueError("of the loss")
        return next_token(model, ids)

    with torch.no_grad():  # its caller's mode does not matter
        before = state()
        try:
            curved(model, names[1:], LossFunctions(loss), batch, 2).through(
                directions(model, names)
            )
        except ValueError:
            assert fails
        assert state() == before
