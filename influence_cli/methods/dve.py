"""DVE: data value embedding (Wang et al. 2024, arXiv:2412.09538).

It is trajectory-specific leave-one-out, from saved checkpoints, summed over the steps of z:

score(z, q) = sum over the steps t at which z was trained on of -w * u_t . g_t(z)

w is the weight of z in the loss of step t, and u_t the derivative of the query's loss at the end by
the gradient of step t (reverse/optimizer_adjoint.py). For plain SGD this is the paper's
w eta g_t(z)^T prod_k (I - eta H_k) grad m(theta_T, q), with H the batch's empirical Fisher. Score
> 0: proponent, without z in its steps the query's loss would end higher, by about the score.
"""

from dataclasses import dataclass
from pathlib import Path

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, deferred, option
from influence_cli.methods.reverse.options import ReverseOptions


@dataclass(frozen=True)
class DveOptions(ReverseOptions):
    """`form`: query or embedding, None chooses the one of fewer operations.

    `embeddings`: folder that keeps data value embeddings. Raises UsageProblem for options that
    exclude each other.
    """

    curvature: str = option(
        "fisher",
        "fisher, the batch's empirical Fisher, or none.",
        "NAME",
        choices=("fisher", "none"),
    )
    form: str | None = option(
        None,
        "query or embedding; both give the same scores. [default: the faster one]",
        "NAME",
        choices=("query", "embedding"),
    )
    embeddings: Path | None = option(
        None,
        "Folder of data value embeddings. The first command writes them; later commands read them.",
        "DIR",
    )

    def __post_init__(self) -> None:
        if self.replay and (self.form == "embedding" or self.embeddings is not None):
            raise UsageProblem(
                "--replay does not combine with --form embedding or --embeddings",
                "embeddings are built from cached gradients, not from replayed steps",
                "leave one of them out",
            )
        if self.form == "query" and self.embeddings is not None:
            raise UsageProblem(
                "--form query does not combine with --embeddings: it makes no embeddings",
                "give one of them",
            )
        if self.embeddings is not None and self.embeddings.is_file():
            raise UsageProblem(
                f"--embeddings {self.embeddings} is a file", "expected: a folder, or a new name"
            )


METHOD = Method(
    name="dve",
    help="data value embedding: effect of leaving the example out of its steps",
    question="What would leaving this example out of all its steps have changed at the end?",
    needs="checkpoints and trajectory.jsonl; for Adam also --replay",
    cost="one gradient per example and segment, then one reverse pass over all steps",
    source="Wang et al. 2024, arXiv:2412.09538",
    score=deferred("influence_cli.methods.reverse.dve_scores:score"),
    trace=deferred("influence_cli.methods.reverse.dve_scores:trace"),
    list_rows=deferred("influence_cli.methods.reverse.dve_scores:list_rows"),
    options=DveOptions,
    parts=("step", "checkpoint", "layer"),
    weighted=False,
    ranks_share="gradients",
    refuses={
        "--normalize": "its scores are loss changes, not inner products",
        "--shard": "it needs whole steps of training; --queries divides its work instead",
    },
)
