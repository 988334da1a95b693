"""Influence functions: the effect of an example through the curvature at one checkpoint
(Koh and Liang 2017, arXiv:1703.04730; Grosse et al. 2023, arXiv:2308.03296).

score(z, q) = g(q) . (H + damping)^{-1} g(z)

H is an approximation to the mean of g g^T over all training examples, one block per parameter
(preconditioners/kinds.py); --fisher true draws the labels of these g from the model. Divided by the
number of training examples, the score is the predicted rise of the query's loss if training had
left z out. Score > 0: proponent. --normalize divides it by the norms of both gradients in the same
metric, sqrt(g . (H + damping)^{-1} g); `self` is the square of that norm.
"""

from dataclasses import dataclass

from influence_cli.methods.declaration import Method, deferred, option
from influence_cli.preconditioners.kinds import KINDS


@dataclass(frozen=True)
class InfluenceOptions:
    """`curvature`: one of KINDS. `damping`: a number above 0, or "auto". `fisher`: whose labels."""

    curvature: str = option(
        "ekfac",
        "Approximation to curvature: the Fisher matrix of each parameter.",
        "NAME",
        choices=tuple(KINDS),
    )
    fisher: str = option(
        "empirical",
        "Labels of the gradients that the curvature is fitted to. empirical: those of the data; "
        "true: one per example, drawn from the model with --seed.",
        "NAME",
        choices=("empirical", "true"),
    )
    damping: str = option(
        "auto",
        "Number to add to the eigenvalues of the curvature. auto: a tenth of their mean, for each "
        "parameter.",
        "X|auto",
    )


METHOD = Method(
    name="influence",
    help="influence functions at one checkpoint: gradients through the inverse curvature",
    question="How would the query's loss change if training had left this example out?",
    needs="one checkpoint",
    cost="as grad-dot, and one pass over all training gradients (ekfac: two) to fit the curvature",
    source="Koh and Liang 2017, arXiv:1703.04730; Grosse et al. 2023, arXiv:2308.03296",
    score=deferred("influence_cli.methods.influence_scores:score"),
    has_self=True,
    open_sqnorms=deferred("influence_cli.methods.influence_scores:open_sqnorms"),
    options=InfluenceOptions,
    parts=("layer",),
    checkpoints="one",
    weighted=False,
    refuses={"--candidates": "its curvature is that of the training data"},
)
