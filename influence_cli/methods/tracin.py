"""TracIn, with checkpoints (TracInCP): Pruthi et al. 2020, arXiv:2002.08484, equation 5.

score(z, q) = sum over checkpoints i of eta_i * g_i(z) . g_i(q)

g_i is the gradient of the loss at checkpoint i, eta_i the learning rate there. eta enters once.
Score > 0: proponent, a step on z lowers the query's loss.
"""

from influence_cli.methods.declaration import Method, deferred

METHOD = Method(
    name="tracin",
    help="sum over checkpoints of learning rate times gradient inner product",
    question="How much did steps on this example lower the query's loss, along the checkpoints?",
    needs="checkpoints and their learning rates",
    cost="one gradient per example and checkpoint, then one product per pair",
    source="Pruthi et al. 2020, arXiv:2002.08484",
    score=deferred("influence_cli.methods.inner_products:score"),
    open_trial=deferred("influence_cli.methods.score_trial:open_trial"),
    open_vectors=deferred("influence_cli.methods.gradient_vectors:gradient_maps"),
    has_self=True,
    parts=("checkpoint", "layer", "token", "query-token"),
    pair_parts=("token", "query-token"),
)
