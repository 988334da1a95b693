"""The adjoint of one optimizer step: how a change of its gradient changes the end of training.

Step t, as torch defines it. g is the (clipped) sum of w x gradient over the entries of the batch:

    SGD       m' = momentum m + g + decay θ
              θ' = θ - rate m'
    Nesterov  θ' = θ - rate (g + decay θ + momentum m')
    AdamW     m' = β1 m + (1-β1) g
              v' = β2 v + (1-β2) g²
              θ' = (1 - rate decay) θ - rate (m'/C1) / (sqrt(v'/C2) + ε),  C = 1 - β^t
    Adam      the same, but decay θ is added to g

In reverse, a_θ, a_m and a_v are the derivatives of a quantity of the final model by θ, m and v. u
is its derivative by the step's gradient before clipping, so it includes the derivative of clipping.
Without its entry z, the quantity would grow by -w_z g(z).u.

H is the derivative of the batch's gradient by θ, or an approximation to it. dve uses the empirical
Fisher, the sum over y of w g(y) g(y)^T (Wang et al. 2024, arXiv:2412.09538, for plain SGD:
u = -rate a_θ). unroll uses the Hessian or the Gauss-Newton matrix. This project derived the rest,
and tests it against real retraining.

Letters: B entries of a batch, D numbers of a parameter, K quantities: queries, or the coordinates
of the end itself.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from influence_cli.gradients.forms import Form
from influence_cli.run.replay import Moments

# Gradients of a batch that are made dense together: both products of a step are matrix products.
DENSE_BYTES = 512 << 20
Pull = Callable[[str, Tensor], None]  # adds H u of a parameter to a tensor (K, D)


class Batch(Protocol):
    """One step's batch where the step was taken, or where its gradients are said to be."""

    @property
    def names(self) -> Collection[str]:
        """The parameters that its loss depends on; torch's optimizers leave the others alone."""

    def gradient(self) -> Mapping[str, Tensor]:
        """(D,) the sum of w x gradient, before clipping."""

    def through(
        self, u: Mapping[str, Tensor], scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], Pull]:
        """Per part of the model (B, K): g(z).(scale u), and what adds H (scale u)."""


class FisherBatch:
    """By per-example gradients: H = sum of w h h^T. `curvature`: h of each entry, often the
    `gradients` themselves; None: H = 0.
    """

    def __init__(
        self,
        gradients: Mapping[str, Form],
        weights: Tensor,
        curvature: Mapping[str, Form] | None = None,
    ) -> None:
        self.gradients, self.weights, self.curvature = gradients, weights, curvature

    @property
    def names(self) -> Collection[str]:
        return self.gradients.keys()

    def gradient(self) -> dict[str, Tensor]:
        return {
            name: form.rmatvec(self.weights[:, None]).squeeze(1)
            for name, form in self.gradients.items()
        }

    def through(
        self, u: Mapping[str, Tensor], scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], Pull]:
        products = {
            name: scale[name] * self.gradients[name].matvec(value.T) for name, value in u.items()
        }
        curvature = self.curvature
        if curvature is None:
            return products, lambda name, theta: None
        along = (
            products
            if curvature is self.gradients
            else {name: scale[name] * curvature[name].matvec(value.T) for name, value in u.items()}
        )
        pull = self.weights[:, None] * total(along)
        return products, lambda name, theta: curvature[name].add_to(theta, pull)


# ---------------------------------------------------------------- how a step changes a parameter
@dataclass(frozen=True)
class Update:
    """SGD's."""

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False

    @property
    def stable(self) -> float:
        """The largest rate x curvature at which steps of this kind don't grow on a quadratic: 2
        without momentum.
        """
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)


@dataclass(frozen=True)
class AdamUpdate:
    """Adam's and AdamW's (`decoupled`), with where the step stood."""

    rate: float
    betas: tuple[float, float]
    epsilon: float
    decay: float
    decoupled: bool
    before: Moments

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def derivatives(self, gradient: Tensor) -> "tuple[Tensor, Tensor, Tensor]":
        """(D,) each, at the step's (clipped) gradient: of θ' by m', of θ' by v', of v' by the
        gradient.
        """
        (b1, b2), before = self.betas, self.before
        t = before.count + 1
        g = gradient if self.decoupled else gradient + self.decay * before.theta
        m = (b1 * before.m + (1 - b1) * g) / (1 - b1**t)
        root = ((b2 * before.v + (1 - b2) * g * g) / (1 - b2**t)).sqrt()
        below = root + self.epsilon
        by_v = self.rate * m / (2 * (1 - b2**t) * root * below.square())
        return (
            -self.rate / ((1 - b1**t) * below),
            torch.where(root > 0, by_v, 0.0),
            2 * (1 - b2) * g,
        )


AnyUpdate = Update | AdamUpdate


class Adjoint:
    """a_θ, a_m and a_v of K quantities, for each parameter (K, D); `step` takes them from after a
    step to before it.
    """

    def __init__(
        self,
        theta: dict[str, Tensor],
        moment: dict[str, Tensor],
        second: dict[str, Tensor] | None = None,
    ) -> None:
        """`moment`: of the parameters with momentum or Adam, `second` of those with Adam; zeros at
        the end of training. All are changed in place.
        """
        self.theta, self.moment, self.second = theta, moment, second or {}

    def step(
        self, batch: Batch, updates: Mapping[str, AnyUpdate], clip: float = 1.0
    ) -> dict[str, Tensor]:
        """One step back. Returns per part of the model (B, K): g(z).u, u after clipping's own
        derivative.
        """
        updates = {name: update for name, update in updates.items() if name in batch.names}
        u: dict[str, Tensor] = {}
        scale = dict.fromkeys(updates, 1.0)
        adam = any(isinstance(update, AdamUpdate) for update in updates.values())
        gradient = batch.gradient() if clip != 1 or adam else {}
        for name, update in updates.items():
            if isinstance(update, AdamUpdate):
                u[name] = self._into_adam(name, update, clip * gradient[name])
            else:
                u[name], scale[name] = self._into_sgd(name, update)
        raw, raw_scale = (
            (unclipped(u, scale, gradient, clip), dict.fromkeys(u, 1.0))
            if clip != 1
            else (u, scale)
        )
        products, pull = batch.through(raw, raw_scale)
        for name, update in updates.items():
            theta, coupled = self.theta[name], update.decay
            if isinstance(update, AdamUpdate):
                self.second[name].mul_(update.betas[1])
                if update.decoupled:
                    theta.mul_(1 - update.rate * update.decay)
                    coupled = 0.0
            if u[name] is theta:
                theta.mul_(1 + coupled * scale[name])
            elif coupled:
                theta.add_(u[name], alpha=coupled)
            pull(name, theta)
            if name in self.moment:
                self.moment[name].mul_(update.momentum)
        return products

    def _into_sgd(self, name: str, update: Update) -> tuple[Tensor, float]:
        """u and what it is to be multiplied by. Leaves a_m of after the step."""
        theta = self.theta[name]
        if not update.momentum:
            return theta, -update.rate
        moment = self.moment[name]
        moment.add_(theta, alpha=-update.rate * (update.momentum if update.nesterov else 1))
        return (torch.add(moment, theta, alpha=-update.rate) if update.nesterov else moment), 1.0

    def _into_adam(self, name: str, update: AdamUpdate, gradient: Tensor) -> Tensor:
        by_m, by_v, v_by_g = update.derivatives(gradient)
        moment, second = self.moment[name], self.second[name]
        moment.addcmul_(self.theta[name], by_m)
        second.addcmul_(self.theta[name], by_v)
        return (1 - update.betas[0]) * moment + v_by_g * second


def unclipped(
    u: Mapping[str, Tensor], scale: Mapping[str, float], gradient: Mapping[str, Tensor], clip: float
) -> dict[str, Tensor]:
    """u by the gradient before it was clipped by its norm, times `clip`: clip (u - ĝ (ĝ.u))."""
    square = torch.stack([value.double().square().sum().cpu() for value in gradient.values()]).sum()
    along = torch.stack([scale[name] * (value @ gradient[name]) for name, value in u.items()]).sum(
        0
    ) / (float(square) or 1.0)  # (K,)
    return {
        name: clip * (scale[name] * value - along[:, None] * gradient[name])
        for name, value in u.items()
    }


def total(products: Mapping[str, Tensor]) -> Tensor:
    """(B, K): the sum over the parameters."""
    first, *others = products.values()
    result = first.clone() if others else first
    for value in others:
        result += value
    return result


def effects(products: Tensor, weights: Tensor, entry_of: Tensor | None = None) -> Tensor:
    """(B, K) by how much the quantity would grow without each entry of a step, from g(z).u: -w_z
    g(z).u.

    `entry_of` (B,), given where the weights of the others are to grow so that their sum stays (the
    mean over the rest of a batch): equal numbers are entries of one example, dropped together. Then
    it is -w_z (g(z) - mean).u / (1 - W_z), W_z the example's share.
    """
    lost = -weights[:, None] * products
    if entry_of is None:
        return lost
    shares = torch.zeros(
        int(entry_of.max()) + 1, dtype=weights.dtype, device=weights.device
    ).index_add_(0, entry_of, weights)
    weight_sum = weights.sum()
    rest = (
        weight_sum - shares[entry_of][:, None]
    )  # 0 where the example is the whole batch: then the step itself is dropped
    return torch.where(
        rest > 1e-6 * weight_sum,
        (lost * weight_sum + weights[:, None] * (weights @ products)) / rest,
        lost,
    )


def gram(gradients: Mapping[str, Form], weights: Tensor, updates: Mapping[str, Update]) -> Tensor:
    """(B, B) float64: sqrt(w w') times the inner products over all parameters, each times its rate:
    the eigenvalues of rate x H.
    """
    result = None
    for name, update in updates.items():
        form = gradients[name]
        product = (
            update.rate * form.dot(form.as_queries()).cpu().double()
        )  # not every device has float64
        result = product if result is None else result + product
    assert result is not None
    root = weights.cpu().double().sqrt()
    return root[:, None] * result * root[None, :]


def densely(gradients: Mapping[str, Form], vectors: int) -> dict[str, Form]:
    """The same gradients in the form in which products with so many vectors, and sums of that many,
    are fastest.
    """
    dense_forms = dict(gradients)
    room = DENSE_BYTES
    for name, form in gradients.items():
        if form.kind == "factors" and vectors > 1:
            size = (
                len(form)
                * torch.Size(form.shape).numel()
                * next(iter(form.tensors().values())).element_size()
            )
            if size <= room:
                dense_forms[name], room = form.dense(), room - size
    return dense_forms
