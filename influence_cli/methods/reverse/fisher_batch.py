"""A step's batch by the gradients of its examples, with the empirical Fisher as curvature.

Letters: B entries of a batch, D numbers of a parameter, K quantities of the final model.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from influence_cli.gradients.forms import Form
from influence_cli.methods.reverse.optimizer_adjoint import AddCurvature, SgdUpdate
from influence_cli.methods.reverse.removal_effects import sum_parameters

# Gradients of a batch that are dense together: both products of a step are then matrix products.
DENSE_BYTES = 512 << 20


class FisherBatch:
    """A StepBatch with H = sum over the entries of w h h^T.

    `curvature`: h of each entry, usually the `gradients` themselves; None: H = 0.
    """

    def __init__(
        self,
        gradients: Mapping[str, Form],
        weights_B: Tensor,
        curvature: Mapping[str, Form] | None = None,
    ) -> None:
        self.gradients, self.weights, self.curvature = gradients, weights_B, curvature

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
    ) -> tuple[dict[str, Tensor], AddCurvature]:
        products = scaled_products(self.gradients, u, scale)
        curvature = self.curvature
        if curvature is None:
            return products, lambda name, theta: None
        along = products if curvature is self.gradients else scaled_products(curvature, u, scale)
        factors_BK = self.weights[:, None] * sum_parameters(along)
        return products, lambda name, theta: curvature[name].add_to(theta, factors_BK)

    def add_statistics(self, theta: Mapping[str, Tensor], a_s: Mapping[str, Tensor]) -> None:
        """dve refuses BatchNorm in train mode, so a_s is empty."""


def scaled_products(
    forms: Mapping[str, Form], u: Mapping[str, Tensor], scale: Mapping[str, float]
) -> dict[str, Tensor]:
    """Per parameter (B, K) the products of each entry's gradient with (scale u)."""
    return {name: scale[name] * forms[name].matvec(value.T) for name, value in u.items()}


def weighted_gram(
    gradients: Mapping[str, Form], weights_B: Tensor, updates: Mapping[str, SgdUpdate]
) -> Tensor:
    """(B, B) float64 inner products of sqrt(rate w) g: it has the eigenvalues of rate x H."""
    gram_BB = None
    for name, update in updates.items():
        form = gradients[name]
        # on the CPU: not every device has float64
        product_BB = update.rate * form.dot(form.as_queries()).cpu().double()
        gram_BB = product_BB if gram_BB is None else gram_BB + product_BB
    assert gram_BB is not None
    root_B = weights_B.cpu().double().sqrt()
    return root_B[:, None] * gram_BB * root_B[None, :]


def make_dense(gradients: Mapping[str, Form], vectors: int) -> dict[str, Form]:
    """The gradients in the form with the fastest products with `vectors` vectors.

    It makes factors dense, up to DENSE_BYTES.
    """
    dense_forms = dict(gradients)
    free_bytes = DENSE_BYTES
    for name, form in gradients.items():
        if form.kind == "factors" and vectors > 1:
            item_bytes = next(iter(form.tensors().values())).element_size()
            size = len(form) * torch.Size(form.shape).numel() * item_bytes
            if size <= free_bytes:
                dense_forms[name], free_bytes = form.dense(), free_bytes - size
    return dense_forms
