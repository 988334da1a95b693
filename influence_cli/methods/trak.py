"""TRAK (Park et al. 2023, arXiv:2303.14186): one Newton step of a linear model of the margin.

score(z, q) = mean over checkpoints i of (P grad m_i(q))^T (Phi_i^T Phi_i + lambda I)^{-1} P g_i(z)

f = log(p / (1 - p)) is the margin of the label, p = exp(-loss) its probability. The rows of Phi_i
are phi(z) = P grad f_i(z), over all training examples z. The loss is a function of the margin, so
g = -(1 - p) grad f: gradients and losses of the loss are enough, and P g(z) = -(1 - p) phi(z) is
TRAK's phi(z) times its factor 1 - p. P projects the gradients of all parameters together.

m is the query's loss, or minus `measure`, and not its margin, as in every method here: score > 0 is
a proponent. For a loss, grad m(q) = -(1 - p_q) grad f(q): at one checkpoint, scores are those of
the margin times 1 - p_q, in the same order. The paper averages 1 - p(z) over checkpoints on its
own; here it stays with the gradient that it belongs to.
"""

import math
from dataclasses import dataclass

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, deferred, option


@dataclass(frozen=True)
class TrakOptions:
    """`damping`: lambda, or auto. Raises UsageProblem for another text."""

    damping: str = option(
        "auto",
        "Ridge that is added to the Gram matrix. auto: 0.1 times its mean eigenvalue.",
        "X|auto",
    )

    def __post_init__(self) -> None:
        if self.damping != "auto" and not 0 <= as_number(self.damping) < math.inf:
            raise UsageProblem(
                f"--damping {self.damping[:60]}", "expected: a number from 0, or auto"
            )

    @property
    def ridge(self) -> float | None:
        """lambda; None: auto."""
        return None if self.damping == "auto" else float(self.damping)


def as_number(text: str) -> float:
    """NaN for a text that is no number."""
    try:
        return float(text)
    except ValueError:
        return math.nan


METHOD = Method(
    name="trak",
    help="influence on a linear model of the label's margin, from projected gradients",
    question="How would the loss end without this example, if the model were linear?",
    needs="checkpoints of a classifier with cross-entropy of one label; at least K examples",
    cost="one gradient per example and checkpoint, read twice; K^3 operations per checkpoint",
    source="Park et al. 2023, arXiv:2303.14186",
    score=deferred("influence_cli.methods.trak_scores:score"),
    options=TrakOptions,
    weighted=False,
    refuses={
        "--normalize": "its scores are loss changes, not inner products",
        "--candidates": "its Gram matrix is that of train_data()",
    },
)
