"""Detects a reverse pass that diverges.

Letters: B entries of a batch, K quantities of the final model.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from influence_cli.errors import GradientError, counted
from influence_cli.gradients.forms import Form
from influence_cli.methods.reverse.fisher_batch import weighted_gram
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint, SgdUpdate

GROWTH = 1e4  # largest growth of the adjoint over a reverse pass


class Stability:
    """Collects the steps whose rate x curvature is too large for their optimizer."""

    def __init__(self) -> None:
        self.unstable: list[tuple[float, int]] = []  # (multiple of the limit, step)

    def check_step(
        self,
        step: int,
        traces_B: Tensor,
        gradients: Mapping[str, Form],
        weights_B: Tensor,
        updates: dict[str, SgdUpdate],
    ) -> None:
        """Compare the largest eigenvalue of a step's rate x H with the limit of such steps.

        `traces_B`: their sum is the trace of rate x H. A small trace needs no eigenvalue.
        """
        limit = min(update.stable for update in updates.values())
        if float(traces_B.sum()) >= limit:
            largest = top_eigenvalue(weighted_gram(gradients, weights_B, updates))
            if largest >= limit:
                self.unstable.append((largest / limit, step))

    def note(self) -> str | None:
        """The worst step, as a note; None if all steps are stable."""
        if not self.unstable:
            return None
        share, step = max(self.unstable)
        verb = "is" if len(self.unstable) == 1 else "are"
        return (
            f"{counted(len(self.unstable), 'step')} {verb} unstable: at step {step} the curvature "
            f"is {share:.3g} times the largest stable one, so scores of earlier steps are too "
            "large. All steps between two checkpoints use gradients of the first one: save "
            "checkpoints more often"
        )


def top_eigenvalue(matrix: Tensor) -> float:
    """The largest eigenvalue of a positive semidefinite matrix, by power iteration."""
    vector = matrix.sum(1) + matrix.diagonal()
    eigenvalue = 0.0
    for _ in range(1000):
        size = float(vector.norm())
        if not 0 < size < float("inf"):
            return size
        last, vector = eigenvalue, matrix @ (vector / size)
        eigenvalue = float(vector.norm())
        if abs(eigenvalue - last) < 1e-6 * eigenvalue:
            break
    return eigenvalue


def state_norms(adjoint: Adjoint) -> Tensor:
    """(K,) the norm of the adjoint of each quantity.

    With Adam without a_m, which has another scale: it is divided by gradients.
    """
    states = (adjoint.theta, {} if adjoint.second else adjoint.moment)
    squares = [value.norm(dim=1).square() for state in states for value in state.values()]
    return torch.stack(squares).sum(0).sqrt().cpu()


def check_finite(values: Tensor, step: int, checkpoint: int) -> None:
    """Raise GradientError for a number of a step that is not finite.

    `checkpoint`: the step of the checkpoint before it.
    """
    if not torch.isfinite(values).all():
        raise not_finite(step, checkpoint)


def not_finite(step: int, checkpoint: int) -> GradientError:
    return GradientError(
        f"backpropagating through training gave a number that is not finite at step {step} "
        f"(after the checkpoint of step {checkpoint})",
        "expected: finite effects. The learning rate, a weight or a gradient of this step, or "
        "the query's gradient, is too large or not a number",
        "look at this line of the trajectory, and run `influence check`",
    )


def check_growth(start_norms_K: Tensor, norms_K: Tensor, step: int) -> None:
    """Raise GradientError where the adjoint grew by more than GROWTH."""
    bad = ~(norms_K <= GROWTH * start_norms_K)
    if bad.any():
        growth = float((norms_K[bad] / start_norms_K[bad])[0])
        raise GradientError(
            f"backpropagating through training diverged at step {step}",
            f"found: the query gradient grew {growth:,.0f}-fold",
            f"expected: at most {GROWTH:,.0f}-fold",
            "use --replay, save checkpoints more often, or start at a later checkpoint (--steps)",
        )
