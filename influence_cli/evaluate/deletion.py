"""deletion: what leaving out a query's top proponents, or opponents, does to that query
(Pruthi et al. 2020, arXiv:2002.08484, section 4; Yeh et al. 2022, arXiv:2202.11844, section 5).

evaluate/top_deletions.py measures it.
"""

from dataclasses import dataclass

from influence_cli.evaluate.declaration import CURVATURE_OPTIONS, RETRAININGS_HELP, Protocol
from influence_cli.methods.declaration import deferred, option
from influence_cli.methods.reverse.options import RENORMALIZE_HELP


@dataclass(frozen=True)
class DeletionOptions:
    """`top_k`: how many examples are left out, one curve point each."""

    top_k: str = option(
        "10,20,40",
        "How many top proponents, and opponents, of each query to leave out: counts, or shares of "
        "the training examples such as 5%.",
        "N,N,...",
    )
    retrainings: int = option(1, RETRAININGS_HELP, "R", minimum=1)
    renormalize: bool = option(False, RENORMALIZE_HELP)


PROTOCOL = Protocol(
    name="deletion",
    help="train without the top proponents, or opponents, of each query",
    evaluate=deferred("influence_cli.evaluate.top_deletions:evaluate"),
    options=DeletionOptions,
    example="influence evaluate my_run deletion --top-k 10,5% --queries 0:20",
    default_methods=("tracin",),
    beside=("random",),
    method_options=CURVATURE_OPTIONS,
    evaluates_files=True,
)
