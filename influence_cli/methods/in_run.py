"""In-Run Data Shapley (Wang et al. 2024, arXiv:2406.11011): what the examples of each step did.

score(z, q) = sum over the steps t at which z was trained on of w c eta G_t . g_t(z)

w is the weight of z in the loss of step t, c the factor of clipping, eta the learning rate, g_t(z)
the gradient at the parameters theta_t before the step. G_t is the query's gradient on the way from
theta_t to theta_t+1: at its start (order 1), the mean of both ends (order 2), or a mean over N
points of the way (path:N). Order 2 is the Shapley value where the query's loss is quadratic:
H (theta_t+1 - theta_t) is the difference of the gradients at both ends, so no Hessian is needed.
With path:N the scores of a step sum to the fall of the query's loss.

Momentum and Adam: an example has a share in each later update, with Adam's scale held fixed
(reverse/in_run_steps.py). Score > 0: proponent, its steps lowered the query's loss.
"""

import re
from dataclasses import dataclass

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, deferred, option
from influence_cli.methods.reverse.options import AT_HELP

MOST_POINTS = 64  # of path:N


@dataclass(frozen=True)
class InRunOptions:
    """`order`: where on the way of a step the query's gradient is taken. `at`: step of the last
    checkpoint, None: the last. Raises UsageProblem for an unknown order.
    """

    order: str = option(
        "2", "Query gradients of a step: 1, 2, or path:N points on its way.", "ORDER"
    )
    at: int | None = option(None, AT_HELP, "STEP", minimum=0)

    def __post_init__(self) -> None:
        match = re.fullmatch(r"path:(\d{1,3})", self.order)
        if self.order not in ("1", "2") and not (match and 1 <= int(match[1]) <= MOST_POINTS):
            raise UsageProblem(
                f"--order {self.order}: unknown",
                f"expected: 1, 2, or path:N with N from 1 to {MOST_POINTS}",
            )

    @property
    def points(self) -> int:
        """N of path:N; 0 for another order."""
        return int(self.order[5:]) if self.order.startswith("path:") else 0


METHOD = Method(
    name="in-run",
    help="In-Run Data Shapley: what each step did with its examples",
    question="How much did the steps on this example lower the query's loss, in this training?",
    needs="checkpoints and trajectory.jsonl, which it replays",
    cost="a replay, with one gradient per query and example at each step",
    source="Wang et al. 2024, arXiv:2406.11011",
    score=deferred("influence_cli.methods.reverse.in_run_scores:score"),
    trace=deferred("influence_cli.methods.reverse.in_run_scores:trace"),
    options=InRunOptions,
    parts=("step", "checkpoint", "layer"),
    weighted=False,
    ranks_share="gradients",
    caches_train=False,
    refuses={
        "--normalize": "its scores are loss changes, not inner products",
        "--project": "it uses gradients at the parameters of each step, which it does not store",
        "--shard": "it needs whole steps of training; --queries divides its work instead",
    },
)
