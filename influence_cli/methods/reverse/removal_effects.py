"""What leaving an entry out of a step changes: -w_z g(z).u.

Letters: B entries of a batch, K quantities of the final model, E examples of a batch.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def sum_parameters(products: Mapping[str, Tensor]) -> Tensor:
    """(B, K) the sum over the parameters."""
    first, *others = products.values()
    result = first.clone() if others else first
    for value in others:
        result += value
    return result


def removal_effects(
    products_BK: Tensor, weights_B: Tensor, example_of_B: Tensor | None = None
) -> Tensor:
    """(B, K) the growth of each quantity without each entry, from the products g(z).u.

    It is -w_z g(z).u. `example_of_B` renormalizes: the other weights grow so that their sum stays,
    as in the mean over the rest of a batch. Entries with equal numbers are one example, left out
    together. The effect is then -w_z (g(z) - mean).u / (1 - W_z), with W_z the example's share.
    """
    lost_BK = -weights_B[:, None] * products_BK
    if example_of_B is None:
        return lost_BK
    shares_E = torch.zeros(
        int(example_of_B.max()) + 1, dtype=weights_B.dtype, device=weights_B.device
    ).index_add_(0, example_of_B, weights_B)
    weight_sum = weights_B.sum()
    # 0 where one example is the whole batch: then the step itself is left out
    rest_B1 = weight_sum - shares_E[example_of_B][:, None]
    return torch.where(
        rest_B1 > 1e-6 * weight_sum,
        (lost_BK * weight_sum + weights_B[:, None] * (weights_B @ products_BK)) / rest_B1,
        lost_BK,
    )
