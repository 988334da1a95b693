"""GradCos: the cosine of gradients at one checkpoint (Charpiat et al. 2019, arXiv:1906.06698).

score(z, q) = g(z) . g(q) / (|g(z)| |g(q)|), and 0 where a gradient is 0

Score > 0: proponent, a small step on z lowers the query's loss.
"""

from influence_cli.methods.declaration import Method, deferred

METHOD = Method(
    name="grad-cos",
    help="gradient cosine at one checkpoint",
    question="Do this example and the query pull the parameters in the same direction?",
    needs="one checkpoint",
    cost="one gradient per example, then one product per pair",
    source="Charpiat et al. 2019, arXiv:1906.06698",
    score=deferred("influence_cli.methods.inner_products:score"),
    open_trial=deferred("influence_cli.methods.score_trial:open_trial"),
    open_vectors=deferred("influence_cli.methods.gradient_vectors:gradient_maps"),
    checkpoints="one",
    weighted=False,
    normalized=True,
    parts=("checkpoint", "layer", "token", "query-token"),
    pair_parts=("token", "query-token"),
)
