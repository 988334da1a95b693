"""The shares of examples in the updates of later steps, for in-run.

A step moves the parameters by a sum over gradients, if Adam's scale P = 1 / (sqrt(v') + eps) is
held fixed at its recorded value:

    SGD    theta_t+1 - theta_t = -eta m',  m' = mu m + g_t + decay theta_t
    Adam   theta_t+1 - theta_t = -eta P m' / (1 - b1^t),  m' = b1 m + (1 - b1) g_t

So the gradient of step t has a share in the update of each later step. In reverse, `moment` sums
what these shares do to a query, by its gradient on the way of each step; u is the derivative of all
these falls by the gradient of step t. Decay and the momentum from before the first step have shares
too.

Letters: K quantities, D numbers of a parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_cli.methods.reverse.optimizer_adjoint import AdamUpdate, SgdUpdate, Update


@dataclass
class Shares:
    """`moment`: (K, D) per parameter with momentum or Adam. `decay`: (K,) what weight decay did,
    positive where it lowered the query's loss.
    """

    moment: dict[str, Tensor]
    decay: Tensor = field(default_factory=lambda: torch.zeros(()))

    def reverse_step(
        self,
        way: Mapping[str, Tensor],
        updates: Mapping[str, Update],
        gradient: Mapping[str, Tensor],
        theta: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """u (K, D) per parameter, and `moment` from before the step.

        `way`: (K, D) the queries' gradients on the way of the step. `gradient`: (D,) of the batch,
        clipped. `theta`: (D,) before the step. A parameter without a gradient is not updated.
        """
        u: dict[str, Tensor] = {}
        for name, update in updates.items():
            if name not in gradient:
                continue
            if isinstance(update, AdamUpdate):
                u[name], decay = self._adam(name, update, way[name], gradient[name])
            else:
                u[name], decay = self._sgd(name, update, way[name])
            if decay is not None:
                self.decay = self.decay - (decay @ theta[name].to(decay.dtype)).double().cpu()
        return u

    def _sgd(self, name: str, update: SgdUpdate, way: Tensor) -> tuple[Tensor, Tensor | None]:
        """u, and the derivative by theta through weight decay."""
        if not update.momentum:
            u = -update.rate * way
        else:
            moment = self.moment[name]
            moment.add_(way, alpha=-update.rate * (update.momentum if update.nesterov else 1))
            u = moment - update.rate * way if update.nesterov else moment.clone()
            moment.mul_(update.momentum)
        return u, update.decay * u if update.decay else None

    def _adam(
        self, name: str, update: AdamUpdate, way: Tensor, gradient_D: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        by_m = update.derivatives(gradient_D)[0]
        moment = self.moment[name]
        moment.addcmul_(way, by_m)
        u = (1 - update.betas[0]) * moment
        moment.mul_(update.betas[0])
        if not update.decay:
            return u, None
        return u, (-update.rate * update.decay * way if update.decoupled else update.decay * u)

    def falls_before(self, momenta: Mapping[str, Tensor]) -> Tensor:
        """(K,) what the momentum from before the first step did. `momenta`: (D,) then."""
        total = torch.zeros((), dtype=torch.float64)
        for name, moment in self.moment.items():
            if name in momenta:
                total = total - (moment @ momenta[name].to(moment.dtype)).double().cpu()
        return total
