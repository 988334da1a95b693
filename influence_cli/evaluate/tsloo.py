"""tsloo: trajectory-specific leave-one-out (Wang et al. 2024, arXiv:2412.09538).

One example is left out of one recorded step, and training continues to its end. The measured
effects on each query's loss are compared with the scores (evaluate/step_removals.py).
"""

from dataclasses import dataclass

from influence_cli.evaluate.declaration import CURVATURE_OPTIONS, Protocol
from influence_cli.methods.declaration import deferred, option
from influence_cli.methods.reverse.options import RENORMALIZE_HELP


@dataclass(frozen=True)
class TslooOptions:
    """`removals`: how many (step, example) pairs are left out, each in a training of its own."""

    removals: int = option(
        100, "Number of removals; each one is a training of its own.", "N", minimum=2
    )
    renormalize: bool = option(False, RENORMALIZE_HELP)


PROTOCOL = Protocol(
    name="tsloo",
    help="leave one example out of one step, then continue training to the end",
    evaluate=deferred("influence_cli.evaluate.step_removals:evaluate"),
    options=TslooOptions,
    example="influence evaluate my_run tsloo --method dve --method tracin --queries 0:50",
    default_methods=("dve",),
    method_options=CURVATURE_OPTIONS,
)
