"""lds: the linear datamodeling score (Park et al. 2023, arXiv:2303.14186).

Training is repeated on random subsets of the training examples. The sum of the scores of a subset
is compared with each query's loss after that training (evaluate/subset_effects.py).
"""

from dataclasses import dataclass

from influence_cli.evaluate.declaration import CURVATURE_OPTIONS, RETRAININGS_HELP, Protocol
from influence_cli.methods.declaration import deferred, option
from influence_cli.methods.reverse.options import RENORMALIZE_HELP


@dataclass(frozen=True)
class LdsOptions:
    """`subsets`: how many; `fraction`: of the training examples, that each keeps."""

    subsets: int = option(40, "Number of random subsets, each trained on.", "M", minimum=2)
    fraction: float = option(0.5, "Share of the training examples that a subset keeps.", "F")
    retrainings: int = option(1, RETRAININGS_HELP, "R", minimum=1)
    renormalize: bool = option(False, RENORMALIZE_HELP)


PROTOCOL = Protocol(
    name="lds",
    help="train on random subsets of the examples",
    evaluate=deferred("influence_cli.evaluate.subset_effects:evaluate"),
    options=LdsOptions,
    example="influence evaluate my_run lds --method unroll --method tracin --queries 0:50",
    default_methods=("tracin",),
    method_options=CURVATURE_OPTIONS,
    evaluates_files=True,
)
