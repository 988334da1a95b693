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

Letters: B entries of a batch, D numbers of a parameter, K quantities of the final model: the
queries' losses, or the coordinates of its own state.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from influence_cli.run.replay_state import Moments

AddCurvature = Callable[[str, Tensor], None]  # adds H u of a parameter to a tensor (K, D)


class StepBatch(Protocol):
    """The batch of one step: its gradient, and products with its gradients and curvature."""

    @property
    def names(self) -> Collection[str]:
        """The parameters that the batch's loss depends on. torch's optimizers skip the others."""

    def gradient(self) -> Mapping[str, Tensor]:
        """Per parameter (D,) the sum of w x gradient over the entries, before clipping."""

    def through(
        self, u: Mapping[str, Tensor], scale: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], AddCurvature]:
        """(B, K) products g(z).(scale u), and a function that adds H (scale u).

        `u`: (K, D) per parameter. The products are per parameter, or summed under the name "".
        """

    def add_statistics(self, theta: Mapping[str, Tensor], a_s: Mapping[str, Tensor]) -> None:
        """Add to a_θ what comes through BatchNorm's running statistics, and move a_s back."""


@dataclass(frozen=True)
class SgdUpdate:
    """The rule of SGD for one parameter."""

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False

    @property
    def stable(self) -> float:
        """The largest rate x curvature at which such steps do not grow on a quadratic.

        It is 2 without momentum.
        """
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)


@dataclass(frozen=True)
class AdamUpdate:
    """The rule of Adam or AdamW (`decoupled`) for one parameter. `before`: its state before."""

    rate: float
    betas: tuple[float, float]
    epsilon: float
    decay: float
    decoupled: bool
    before: Moments

    @property
    def momentum(self) -> float:
        return self.betas[0]

    def derivatives(self, gradient_D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(D,) each, at the clipped gradient: dθ'/dm', dθ'/dv', dv'/dg."""
        (b1, b2), before = self.betas, self.before
        t = before.count + 1
        g = gradient_D if self.decoupled else gradient_D + self.decay * before.theta
        m = (b1 * before.m + (1 - b1) * g) / (1 - b1**t)
        root = ((b2 * before.v + (1 - b2) * g * g) / (1 - b2**t)).sqrt()
        below = root + self.epsilon
        by_v = self.rate * m / (2 * (1 - b2**t) * root * below.square())
        return (
            -self.rate / ((1 - b1**t) * below),
            torch.where(root > 0, by_v, 0.0),
            2 * (1 - b2) * g,
        )


Update = SgdUpdate | AdamUpdate


class Adjoint:
    """a_θ, a_m and a_v of K quantities, (K, D) per parameter. It moves from step to step.

    `theta`, `moment`, `second`: a_θ, a_m and a_v. `moment` holds the parameters with momentum or
    Adam, `second` those with Adam. Both are zero at the end of training. `statistics`: (K, 2 C) of
    BatchNorm layers (running_statistics.py). Changed in place.
    """

    def __init__(
        self,
        theta: dict[str, Tensor],
        moment: dict[str, Tensor],
        second: dict[str, Tensor] | None = None,
        statistics: dict[str, Tensor] | None = None,
    ) -> None:
        self.theta, self.moment, self.second = theta, moment, second or {}
        self.statistics = statistics or {}

    @property
    def states(self) -> dict[str, dict[str, Tensor]]:
        """All of them, by name."""
        return {
            "theta": self.theta,
            "moment": self.moment,
            "second": self.second,
            "statistics": self.statistics,
        }

    def reverse_step(
        self, batch: StepBatch, updates: Mapping[str, Update], clip: float = 1.0
    ) -> dict[str, Tensor]:
        """Move from after a step to before it. Returns (B, K) products g(z).u.

        u includes the derivative of clipping. `clip`: the factor that clipped the gradient.
        """
        updates = {name: update for name, update in updates.items() if name in batch.names}
        has_adam = any(isinstance(update, AdamUpdate) for update in updates.values())
        gradient = batch.gradient() if clip != 1 or has_adam else {}
        u, scale = self._directions(updates, gradient, clip)
        if clip == 1:
            products, add_curvature = batch.through(u, scale)
        else:
            unclipped = unclipped_directions(u, scale, gradient, clip)
            products, add_curvature = batch.through(unclipped, dict.fromkeys(u, 1.0))
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
            add_curvature(name, theta)
            if name in self.moment:
                self.moment[name].mul_(update.momentum)
        if self.statistics:
            batch.add_statistics(self.theta, self.statistics)
        return products

    def _directions(
        self, updates: Mapping[str, Update], gradient: Mapping[str, Tensor], clip: float
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Per parameter u by the clipped gradient, (K, D), and a factor of it."""
        u: dict[str, Tensor] = {}
        scale = dict.fromkeys(updates, 1.0)
        for name, update in updates.items():
            if isinstance(update, AdamUpdate):
                u[name] = self._adam_direction(name, update, clip * gradient[name])
            else:
                u[name], scale[name] = self._sgd_direction(name, update)
        return u, scale

    def _sgd_direction(self, name: str, update: SgdUpdate) -> tuple[Tensor, float]:
        """u and its factor. Leaves a_m of after the step."""
        theta = self.theta[name]
        if not update.momentum:
            return theta, -update.rate
        moment = self.moment[name]
        moment.add_(theta, alpha=-update.rate * (update.momentum if update.nesterov else 1))
        return (torch.add(moment, theta, alpha=-update.rate) if update.nesterov else moment), 1.0

    def _adam_direction(self, name: str, update: AdamUpdate, gradient_D: Tensor) -> Tensor:
        by_m, by_v, v_by_g = update.derivatives(gradient_D)
        moment, second = self.moment[name], self.second[name]
        moment.addcmul_(self.theta[name], by_m)
        second.addcmul_(self.theta[name], by_v)
        return (1 - update.betas[0]) * moment + v_by_g * second


def unclipped_directions(
    u: Mapping[str, Tensor], scale: Mapping[str, float], gradient: Mapping[str, Tensor], clip: float
) -> dict[str, Tensor]:
    """u by the gradient g before clipping by its norm: clip (u - ĝ (ĝ.u)), with ĝ = g / |g|."""
    square = torch.stack([value.double().square().sum().cpu() for value in gradient.values()]).sum()
    along_K = torch.stack(
        [scale[name] * (value @ gradient[name]) for name, value in u.items()]
    ).sum(0) / (float(square) or 1.0)
    return {
        name: clip * (scale[name] * value - along_K[:, None] * gradient[name])
        for name, value in u.items()
    }
