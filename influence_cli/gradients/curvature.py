"""A batch's exact curvature at the parameters that a model has: for a direction u, g(z).u of every
example z, and H u. No per-example gradient is formed.

With L(v) = sum over z of v_z loss(z), the batch's gradient G = dL(w) / dtheta is taken with its own
tape and differentiated once more: d(G.u)/dtheta = H u (Pearlmutter 1994, "Fast exact multiplication
by the Hessian") and d(G.u)/dv = the products g(z).u. One backward pass through the backward pass
gives both; the forward pass and its backward are shared by all directions. This takes fewer passes
than forward mode and works for more layers (docs/log.md has both measured); it asks for layers
whose backward can be differentiated.

B examples, K directions, D numbers of a parameter.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from influence_cli.errors import GradientError, is_out_of_memory
from influence_cli.gradients.capture import checked, differing, frozen, rounding

Directions = dict[str, Tensor]  # per parameter (K, D)


@dataclass(frozen=True)
class Functions:
    """What the definition says of a batch. `outputs`, `loss_from_outputs`: given for Gauss-Newton,
    which keeps the loss's own curvature by the outputs and leaves out that of the outputs by the
    parameters: J^T S J.
    """

    loss: Callable[[nn.Module, Any], Tensor]
    outputs: Callable[[nn.Module, Any], Tensor] | None = None
    loss_from_outputs: Callable[[Tensor, Any], Tensor] | None = None


class Curvature:
    """Of one batch at the parameters the model has now. `weights` (B,); `most`: directions taken in
    one pass, by vmap; `alone` hears why not, where a layer can't be batched so, and directions go
    one by one.

    Raises GradientError: a layer whose backward can't be differentiated; a loss that is not one
    number per example.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        functions: Functions,
        batch: Any,
        weights: Tensor,
        most: int = 1,
        alone: Callable[[str], None] = lambda why: None,
    ) -> None:
        self.model, self.most, self._alone = model, most, alone
        theta = [model.get_parameter(name) for name in names]
        with twice_differentiable(model, names), PlainWeightNorm():
            self._way: _Hessian | _GaussNewton = (
                _Hessian(functions.loss, model, batch, weights, theta)
                if functions.outputs is None
                else _GaussNewton(functions, model, batch, weights, theta)
            )
        pairs = zip(names, self._way.grads, strict=True)
        self.names = [
            name for name, grad in pairs if grad is not None
        ]  # those that the batch's loss depends on
        self._weights = self._way.v.detach()

    def gradient(self) -> dict[str, Tensor]:
        """(D,) the sum over the batch of w g, of the parameters that the loss depends on."""
        pairs = zip(self.names, (grad for grad in self._way.grads if grad is not None), strict=True)
        return {name: grad.detach().reshape(-1) for name, grad in pairs}

    def through(
        self, u: Mapping[str, Tensor], by_parameter: bool = False
    ) -> tuple[dict[str, Tensor], Directions]:
        """(B, K) products g(z).u, as one (named "") or `apart` by parameter, which takes a pass for
        each; and H u.
        """
        width = len(next(iter(u.values())))
        products: list[dict[str, Tensor]] = []
        pulls: list[Directions] = []
        for first in range(0, width, self.most):
            some = [u[name][first : first + self.most] for name in self.names]
            try:
                part, pull = self._through(some, by_parameter)
            except RuntimeError as error:
                if self.most == 1 or is_out_of_memory(error):
                    raise explained(error) from error
                self.most = 1
                self._alone(" ".join(str(error).split())[:100])
                return self.through(u, by_parameter)
            products.append(part)
            pulls.append(pull)
        if len(products) == 1:
            return products[0], pulls[0]
        return (
            {name: torch.cat([part[name] for part in products], dim=1) for name in products[0]},
            {name: torch.cat([pull[name] for pull in pulls]) for name in self.names},
        )

    def _through(
        self, some: list[Tensor], by_parameter: bool
    ) -> tuple[dict[str, Tensor], Directions]:
        grads = [grad for grad in self._way.grads if grad is not None]
        shaped = [
            value.to(grad.dtype).view(-1, *grad.shape)
            for value, grad in zip(some, grads, strict=True)
        ]
        with twice_differentiable(self.model, self.names):
            products, pull = self._way.through(
                grads, shaped, [self.model.get_parameter(name) for name in self.names]
            )
            self._check(products, grads, shaped)
            by_name = {"": products.T}
            if by_parameter:
                by_name = {
                    name: self._way.products([grad], [direction]).T
                    for name, grad, direction in zip(self.names, grads, shaped, strict=True)
                }
        return by_name, {
            name: value.reshape(len(value), -1)
            for name, value in zip(self.names, pull, strict=True)
        }

    def _check(self, products: Tensor, grads: list[Tensor], u: list[Tensor]) -> None:
        """The sum of w g(z).u is G.u, unless a backward left torch's tape, so that nothing could be
        differentiated through it.
        """
        total = torch.stack(
            [d.reshape(len(d), -1) @ g.detach().flatten() for d, g in zip(u, grads, strict=True)]
        ).sum(0)
        sizes = torch.stack(
            [
                d.reshape(len(d), -1).norm(dim=1) * g.detach().norm()
                for d, g in zip(u, grads, strict=True)
            ]
        ).sum(0)
        parts = products * self._weights
        difference, scale = (
            (parts.sum(1) - total).abs(),
            torch.maximum(parts.abs().sum(1), total.abs()),
        )
        if bool((difference > 0.01 * scale + rounding(total.dtype) * sizes).any()):
            raise no_second_derivative("a layer or loss whose backward can be taken only once")


class _Hessian:
    def __init__(
        self,
        loss: Callable[..., Tensor],
        model: nn.Module,
        batch: Any,
        weights: Tensor,
        theta: list[nn.Parameter],
    ) -> None:
        self.losses = checked("loss()", loss(model, batch), len(weights))
        self.v = weights.detach().to(self.losses.dtype, copy=True).requires_grad_()
        self.grads = differentiated(self.losses @ self.v, theta)

    def through(
        self, grads: list[Tensor], u: list[Tensor], theta: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        *pull, products = derivatives(grads, [*theta, self.v], u)
        return products, pull

    def products(self, grads: list[Tensor], u: list[Tensor]) -> Tensor:
        """(K, B)."""
        return derivatives(grads, [self.v], u)[0]


class _GaussNewton:
    """G = J^T c at c = dL/d(outputs); d(G.u)/dc = J u, through the loss S J u and the products, and
    J^T S J u by a plain backward pass.
    """

    def __init__(
        self,
        functions: Functions,
        model: nn.Module,
        batch: Any,
        weights: Tensor,
        theta: list[nn.Parameter],
    ) -> None:
        assert functions.outputs is not None
        assert functions.loss_from_outputs is not None
        self.out = functions.outputs(model, batch)
        if not isinstance(self.out, Tensor) or not self.out.requires_grad:
            what = (
                "a tensor that is not differentiable"
                if isinstance(self.out, Tensor)
                else f"a {type(self.out).__name__}"
            )
            raise GradientError(
                f"outputs() returned {what}",
                "expected: a tensor (B, ...) that depends on the model's parameters",
            )
        self.cut = self.out.detach().requires_grad_()
        again = checked(
            "loss_from_outputs()", functions.loss_from_outputs(self.cut, batch), len(weights)
        )
        self.v = weights.detach().to(again.dtype, copy=True).requires_grad_()
        (by_out,) = differentiated(again @ self.v, [self.cut])
        if by_out is None:
            raise GradientError(
                "loss_from_outputs() does not depend on the outputs",
                "expected: loss() as a function of outputs()",
            )
        self.by_out = by_out
        self.c = by_out.detach().requires_grad_()
        self.grads = differentiated(self.out, theta, self.c)

    def through(
        self, grads: list[Tensor], u: list[Tensor], theta: list[nn.Parameter]
    ) -> tuple[Tensor, list[Tensor]]:
        along = derivatives(grads, [self.c], u)[0]
        curved, products = derivatives([self.by_out], [self.cut, self.v], [along])
        return products, derivatives([self.out], theta, [curved])

    def products(self, grads: list[Tensor], u: list[Tensor]) -> Tensor:
        return derivatives([self.by_out], [self.v], [derivatives(grads, [self.c], u)[0]])[0]


def differentiated(
    total: Tensor, theta: Sequence[Tensor], along: Tensor | None = None
) -> list[Tensor | None]:
    """The gradient with its own tape; None of what is not reached."""
    try:
        derivatives = torch.autograd.grad(total, theta, along, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        raise explained(error) from error
    return [grad if grad is None or not grad.is_sparse else grad.to_dense() for grad in derivatives]


def derivatives(of: list[Tensor], by: Sequence[Tensor], along: list[Tensor]) -> list[Tensor]:
    """The derivatives of sum of `of` x `along`, for each of K `along`: (K, *shape). Zeros of what
    is not reached.
    """
    width = len(along[0])
    present = [
        (value, direction)
        for value, direction in zip(of, along, strict=True)
        if value.requires_grad
    ]
    if not present:  # a loss that is linear in the parameters
        return [value.new_zeros(width, *value.shape) for value in by]
    values, directions = zip(*present, strict=True)
    differentiable = [value for value in by if value.requires_grad]
    if width > 1:
        results = torch.autograd.grad(
            values,
            differentiable,
            directions,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    else:
        one = torch.autograd.grad(
            values,
            differentiable,
            [direction[0] for direction in directions],
            retain_graph=True,
            allow_unused=True,
        )
        results = tuple(value if value is None else value[None] for value in one)
    by_id = {id(value): grad for value, grad in zip(differentiable, results, strict=True)}
    grads = [by_id.get(id(value)) for value in by]
    return [
        value.new_zeros(width, *value.shape) if grad is None else grad.detach()
        for value, grad in zip(by, grads, strict=True)
    ]


@contextlib.contextmanager
def twice_differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Kernels whose backward can be differentiated: attention in plain products, no cuDNN,
    embeddings' gradients dense.
    """
    sparse = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    ]
    try:
        for module in sparse:
            module.sparse = False
        with (
            frozen(model, names),
            torch.enable_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        for module in sparse:
            module.sparse = True


class PlainWeightNorm(TorchFunctionMode):
    """torch 2.13 differentiates weight norm a second time as if its norms were constants."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            v, g, dim = (*args, 0)[:3]
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def explained(error: RuntimeError) -> Exception:
    if "is not implemented" not in str(error) and "double backward" not in str(error).lower():
        return error
    return no_second_derivative(str(error).splitlines()[0])


def no_second_derivative(what: str) -> GradientError:
    return GradientError(
        f"exact curvature needs a second derivative that torch does not have: {what}",
        "expected: layers and losses whose backward can be differentiated",
        "--layers leaves layers out, other operations may do the same (an Embedding and a mean for "
        "an EmbeddingBag)",
        "--method dve takes the empirical Fisher, which needs first derivatives only",
    )


# ---------------------------------------------------------------- before any work
def verify(
    model: nn.Module, names: Sequence[str], functions: Functions, batch: Any, size: int
) -> None:
    """Compare the curvature of a first batch with differences of plain gradients; Gauss-Newton's
    gradient with that of loss().

    `model` and `batch` in float64; the model's parameters are put back. Raises GradientError where
    they differ.
    """
    weights = torch.full(
        (size,), 1 / size, dtype=torch.float64, device=model.get_parameter(names[0]).device
    )
    curvature = Curvature(model, names, functions, batch, weights)
    theta = {name: model.get_parameter(name) for name in curvature.names}

    def gradient() -> dict[str, Tensor]:
        with twice_differentiable(model, names):
            losses = checked("loss()", functions.loss(model, batch), size)
            grads = torch.autograd.grad(losses @ weights, list(theta.values()), allow_unused=True)
        return {
            n: (torch.zeros_like(p) if g is None else g).flatten()
            for (n, p), g in zip(theta.items(), grads, strict=True)
        }

    here = gradient()
    if differing(curvature.gradient(), here):
        raise GradientError(
            "loss_from_outputs(outputs()) is not loss(): its gradient is another one",
            "expected: the same loss, in two parts, that depends on the model through the outputs "
            "only",
            "--curvature hessian needs loss() only",
        )
    generator = torch.Generator().manual_seed(0)
    u = {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        for n, p in theta.items()
    }
    _, pull = curvature.through({name: value.flatten()[None] for name, value in u.items()})
    if functions.outputs is not None:
        return
    before = {name: value.detach().clone() for name, value in theta.items()}
    errors = []
    for by in (1e-6, 1e-8):  # the smaller one crosses fewer kinks
        with torch.no_grad():
            for name, value in theta.items():
                value.copy_(before[name] + by * u[name])
        moved_gradient = gradient()
        with torch.no_grad():
            for name, value in theta.items():
                value.copy_(before[name])
        off = torch.cat(
            [(moved_gradient[name] - here[name]) / by - pull[name][0] for name in theta]
        ).norm()
        size_of = torch.cat([pull[name][0] for name in theta]).norm()
        errors.append(
            float(off / (size_of + 1e-9 * torch.cat(list(here.values())).norm() / by))
        )  # rounding
    if min(errors) > 0.02:
        raise no_second_derivative(
            f"second derivatives are {min(errors):.0%} apart from differences of first ones"
        )
