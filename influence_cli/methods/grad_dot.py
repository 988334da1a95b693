"""GradDot: the inner product of gradients at one checkpoint (Charpiat et al. 2019,
arXiv:1906.06698).

score(z, q) = g(z) . g(q)

Score > 0: proponent, a small step on z lowers the query's loss.
"""

from influence_cli.methods.declaration import Method, deferred

METHOD = Method(
    name="grad-dot",
    help="gradient inner product at one checkpoint",
    question="Would a step on this example lower the query's loss at this checkpoint?",
    needs="one checkpoint",
    cost="one gradient per example, then one product per pair",
    source="Charpiat et al. 2019, arXiv:1906.06698",
    score=deferred("influence_cli.methods.inner_products:score"),
    open_trial=deferred("influence_cli.methods.score_trial:open_trial"),
    open_vectors=deferred("influence_cli.methods.gradient_vectors:gradient_maps"),
    has_self=True,
    checkpoints="one",
    weighted=False,
    parts=("checkpoint", "layer", "token", "query-token"),
    pair_parts=("token", "query-token"),
)
