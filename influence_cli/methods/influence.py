"""Influence functions: the effect of an example through the curvature at one checkpoint
(Koh and Liang 2017, arXiv:1703.04730; Grosse et al. 2023, arXiv:2308.03296).

score(z, q) = g(q) . (H + damping)^{-1} g(z)

H is the exact Hessian or Gauss-Newton matrix of the mean loss of all training examples, over all
parameters together; or an approximation to the mean of g g^T, one block per layer or parameter
(preconditioners/kinds.py); --fisher true draws the labels of these g from the model. Divided by the
number of training examples, the score is the predicted rise of the query's loss if training had
left z out. Score > 0: proponent. --normalize divides it by the norms of both gradients in the same
metric, sqrt(g . (H + damping)^{-1} g); `self` is the square of that norm.
"""

from dataclasses import dataclass

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, deferred, option
from influence_cli.preconditioners.kinds import EXACT, KINDS, SOLVERS


@dataclass(frozen=True)
class InfluenceOptions:
    """`curvature`: one of KINDS or EXACT. `damping`: a number above 0, or "auto". `fisher`: whose
    labels, None for those of the data. `solver`: of SOLVERS, None for cg. Raises UsageProblem for
    options that exclude each other.
    """

    curvature: str = option(
        "ekfac",
        "ekfac, kfac, shampoo or fisher: approximations by the Fisher matrix of each layer. "
        "hessian or gauss-newton: exact, over all parameters together.",
        "NAME",
        choices=(*KINDS, *EXACT),
    )
    fisher: str | None = option(
        None,
        "Labels of the gradients that approximations are fitted to. empirical: those of the data; "
        "true: one per example, drawn from the model with --seed. [default: empirical]",
        "NAME",
        choices=("empirical", "true"),
    )
    damping: str = option(
        "auto",
        "Number to add to the eigenvalues of the curvature. auto: a tenth of their mean, for each "
        "layer; hessian and gauss-newton: 1 % of the largest, and at least twice the size of "
        "the most negative.",
        "X|auto",
    )
    solver: str | None = option(
        None,
        "How hessian and gauss-newton are inverted: cg, or lissa, which needs more iterations. "
        "[default: cg]",
        "NAME",
        choices=SOLVERS,
    )

    def __post_init__(self) -> None:
        if self.fisher is not None and self.curvature in EXACT:
            raise UsageProblem(
                f"--fisher {self.fisher} does not apply to --curvature {self.curvature}, which is "
                "exact",
                f"leave out --fisher, or choose --curvature {' or '.join(KINDS)}",
            )
        if self.solver is not None and self.curvature not in EXACT:
            raise UsageProblem(
                f"--solver {self.solver} does not apply to --curvature {self.curvature}: its "
                "inverse needs no solver",
                f"leave out --solver, or choose --curvature {' or '.join(EXACT)}",
            )


METHOD = Method(
    name="influence",
    help="influence functions at one checkpoint: gradients through the inverse curvature",
    question="How would the query's loss change if training had left this example out?",
    needs="one checkpoint",
    cost="as grad-dot, and one pass over all training gradients (ekfac: two); hessian: tens to "
    "hundreds of passes for each block of queries",
    source="Koh and Liang 2017, arXiv:1703.04730; Grosse et al. 2023, arXiv:2308.03296",
    score=deferred("influence_cli.methods.influence_scores:score"),
    has_self=True,
    open_sqnorms=deferred("influence_cli.methods.influence_scores:open_sqnorms"),
    open_vectors=deferred("influence_cli.methods.influence_vectors:open_vectors"),
    estimate_cost=deferred("influence_cli.methods.influence_scores:estimate_cost"),
    options=InfluenceOptions,
    parts=("layer", "token", "query-token"),
    pair_parts=("token", "query-token"),
    checkpoints="one",
    weighted=False,
    refuses={"--candidates": "its curvature is that of the training data"},
)
