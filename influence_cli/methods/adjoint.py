"""The adjoint of an optimizer's own step: what a small change of a step's gradient does to the end of training.

Step t of SGD, with g the (clipped) sum of w x gradient over the entries y of its batch (torch's own definition):

    m' = momentum m + g + decay θ;   θ' = θ - rate m'      (Nesterov: θ' = θ - rate (g + decay θ + momentum m'))

Backward, a_θ and a_m are the derivatives of some quantity of the end by θ and m, and u that by the step's gradient. Without its entry z the
quantity would grow by -w_z g(z).u. H = sum over y of w h(y) h(y)^T stands for the derivative of the gradient by θ: with h = g it is the
empirical Fisher of data value embedding (Wang et al. 2024, arXiv:2412.09538, which has plain SGD: u = -rate a_θ). The rest was derived for
this project and is tested against retraining of a linear regression, where h = sqrt(curvature of the loss) x input makes it exact.

B entries of a batch, D numbers of a parameter, K quantities carried at once: queries, or the coordinates of the end itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.forms import Form

DENSE_BYTES = 512 << 20  # gradients of a batch made dense at once, so that both products of a step are plain matrix products


@dataclass(frozen=True)
class Update:
    """How one step changes one parameter."""

    rate: float
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False

    @property
    def stable(self) -> float:
        """The largest rate x curvature at which steps of this kind don't grow on a quadratic: 2 without momentum."""
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov)


class Adjoint:
    """a_θ and a_m of K quantities, for each parameter (K, D); `step` takes them from after a step to before it."""

    def __init__(self, theta: dict[str, Tensor], moment: dict[str, Tensor]) -> None:
        """`moment`: of the parameters with momentum; zeros at the end of training. Both are changed in place."""
        self.theta, self.moment = theta, moment

    def step(
        self,
        gradients: Mapping[str, Form],
        weights: Tensor,
        updates: Mapping[str, Update],
        clip: float = 1.0,
        curvature: Mapping[str, Form] | None = None,
    ) -> dict[str, Tensor]:
        """One step back. Returns per parameter (B, K): g(z).u over that parameter, u after clipping's own derivative.

        `weights`: (B,). `curvature`: h of each entry, often `gradients` itself; None: H = 0.
        """
        u: dict[str, Tensor] = {}
        scale: dict[str, float] = {}
        for name, update in updates.items():
            u[name], scale[name] = self.theta[name], -update.rate
            if update.momentum:
                moment = self.moment[name]
                moment.add_(self.theta[name], alpha=-update.rate * (update.momentum if update.nesterov else 1))
                u[name], scale[name] = moment, 1.0
                if update.nesterov:
                    u[name] = torch.add(moment, self.theta[name], alpha=-update.rate)
        products = {name: scale[name] * gradients[name].matvec(u[name].T) for name in updates}
        hessian = {} if curvature is None or curvature is gradients else {n: scale[n] * curvature[n].matvec(u[n].T) for n in updates}
        if clip != 1:
            batch = {name: gradients[name].rmatvec(weights[:, None]) for name in updates}  # (D, 1): the sum over the batch, unclipped
            square = sum(float(value.norm()) ** 2 for value in batch.values())
            along = weights @ total(products) / square if square else torch.zeros_like(weights @ total(products))
            products = {name: clip * (value - gradients[name].matvec(batch[name]) * along) for name, value in products.items()}
            if curvature is not None:
                hessian = {name: clip * (value - curvature[name].matvec(batch[name]) * along) for name, value in hessian.items()}
        pull = None if curvature is None else weights[:, None] * total(hessian or products)
        for name, update in updates.items():
            theta = self.theta[name]
            if u[name] is theta:
                theta.mul_(1 + update.decay * scale[name])
            elif update.decay:
                theta.add_(u[name], alpha=update.decay)
            if pull is not None and curvature is not None:
                curvature[name].add_to(theta, pull)
            if update.momentum:
                self.moment[name].mul_(update.momentum)
        return products


def total(products: Mapping[str, Tensor]) -> Tensor:
    """(B, K): the sum over the parameters."""
    first, *others = products.values()
    found = first.clone() if others else first
    for value in others:
        found += value
    return found


def effects(products: Tensor, weights: Tensor, entry_of: Tensor | None = None) -> Tensor:
    """(B, K) by how much the quantity would grow without each entry of a step, from g(z).u: -w_z g(z).u.

    `entry_of` (B,), given where the weights of the others are to grow so that their sum stays (the mean over the rest of a batch): equal
    numbers are entries of one example, dropped together. Then it is -w_z (g(z) - mean).u / (1 - W_z), W_z the example's share.
    """
    lost = -weights[:, None] * products
    if entry_of is None:
        return lost
    shares = torch.zeros(int(entry_of.max()) + 1, dtype=weights.dtype, device=weights.device).index_add_(0, entry_of, weights)
    whole = weights.sum()
    rest = whole - shares[entry_of][:, None]  # 0 where the example is the whole batch: then the step itself is dropped
    return torch.where(rest > 1e-6 * whole, (lost * whole + weights[:, None] * (weights @ products)) / rest, lost)


def gram(gradients: Mapping[str, Form], weights: Tensor, updates: Mapping[str, Update]) -> Tensor:
    """(B, B) float64: sqrt(w w') times the inner products over all parameters, each times its rate: the eigenvalues of rate x H."""
    whole = None
    for name, update in updates.items():
        ours = gradients[name]
        found = update.rate * ours.dot(ours.ready()).cpu().double()  # not every device has float64
        whole = found if whole is None else whole + found
    assert whole is not None
    root = weights.cpu().double().sqrt()
    return root[:, None] * whole * root[None, :]


def densely(gradients: Mapping[str, Form], vectors: int) -> dict[str, Form]:
    """The same gradients in the form in which products with so many vectors, and sums of that many, are fastest."""
    found = dict(gradients)
    room = DENSE_BYTES
    for name, form in gradients.items():
        if form.kind == "factors" and vectors > 1:
            size = len(form) * torch.Size(form.shape).numel() * next(iter(form.tensors().values())).element_size()
            if size <= room:
                found[name], room = form.dense(), room - size
    return found
