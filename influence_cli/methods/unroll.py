"""Unroll: the effect of leaving an example out of its steps, with exact curvature.

score(z, q) = sum over the steps t at which z was trained on of -w * u_t . g_t(z)

As in dve, u_t is the derivative of the query's loss at the end by the gradient of step t. But here
the curvature of step t is exact: the Hessian of the step's loss, or Gauss-Newton's J^T S J, which
has no negative curvature. Where gradients use each step's own parameters (every step saved, or
--replay), the score is the exact derivative of retraining by the example's weight. It stores no
gradients of training examples.
"""

from dataclasses import dataclass

from influence_cli.methods.declaration import Method, deferred, option
from influence_cli.methods.reverse.options import ReverseOptions


@dataclass(frozen=True)
class UnrollOptions(ReverseOptions):
    """The options of backpropagating through training, with exact curvature."""

    curvature: str = option(
        "hessian",
        "hessian, or gauss-newton.",
        "NAME",
        choices=("hessian", "gauss-newton"),
    )


METHOD = Method(
    name="unroll",
    help="like dve, with exact Hessian-vector products; closest to retraining",
    question="What would retraining without this example have changed at the end, to first order?",
    needs="checkpoints and trajectory.jsonl; for Adam also --replay; a loss with two derivatives",
    cost="several trainings of the recorded steps; influence inspect measures it",
    source="exact derivative of training; Maclaurin et al. 2015, arXiv:1502.03492",
    score=deferred("influence_cli.methods.reverse.unroll_scores:score"),
    trace=deferred("influence_cli.methods.reverse.unroll_scores:trace"),
    estimate_cost=deferred("influence_cli.methods.reverse.unroll_scores:estimate_cost"),
    options=UnrollOptions,
    parts=("step", "checkpoint", "layer"),
    weighted=False,
    ranks_share="gradients",
    caches_train=False,
    refuses={
        "--normalize": "its scores are loss changes, not inner products",
        "--project": "it runs the model itself and stores no gradients of training examples",
        "--shard": "it needs whole steps of training; --queries divides its work instead",
    },
)
