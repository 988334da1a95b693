"""The methods, one line each."""

from influence_cli.methods.declaration import Method

METHODS = {
    "tracin": Method("tracin", "sum over checkpoints of learning rate x gradient dot product"),
    "grad-dot": Method(
        "tracin", "gradient dot product at one checkpoint", weighted=False, checkpoints="one"
    ),
    "grad-cos": Method(
        "tracin",
        "gradient cosine at one checkpoint",
        weighted=False,
        checkpoints="one",
        normalized=True,
    ),
    "dve": Method(
        "dve",
        "data value embedding: what leaving the example out of a step would have done",
        weighted=False,
        curvatures=("fisher", "none"),
        parts=("step", "checkpoint", "layer"),
    ),
    "unroll": Method(
        "unroll",
        "dve with the loss's exact curvature, from the model itself: nearest to training again",
        weighted=False,
        curvatures=("hessian", "gauss-newton"),
        parts=("step", "checkpoint", "layer"),
    ),
    "tracin-we": Method(
        "tracin_we",
        "tracin through word embeddings, down to the word",
        words=True,
        parts=("checkpoint", "word"),
    ),
}
