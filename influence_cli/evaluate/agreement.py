"""agreement: do two score files, runs or methods give the same scores?

evaluate/score_agreement.py compares them. It trains nothing.
"""

from dataclasses import dataclass

from influence_cli.evaluate.declaration import CURVATURE_OPTIONS, Protocol
from influence_cli.methods.declaration import deferred, option


@dataclass(frozen=True)
class AgreementOptions:
    """`top_k`: the numbers of top proponents whose overlap is a figure."""

    top_k: str = option("10", "Numbers of top proponents of which to count common ones.", "N,N,...")


PROTOCOL = Protocol(
    name="agreement",
    help="compare score files, runs, or methods",
    evaluate=deferred("influence_cli.evaluate.score_agreement:compare_methods"),
    compare_tables=deferred("influence_cli.evaluate.score_agreement:compare_tables"),
    options=AgreementOptions,
    example="influence evaluate my_run agreement tracin.csv dve.csv",
    default_methods=(),
    method_options=CURVATURE_OPTIONS,
)
