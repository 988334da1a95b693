"""Self-influence: the score of TracIn of an example on itself (arXiv:2002.08484, section 4.1)."""

import itertools

import numpy as np

from influence_cli.cache.id_blocks import cut_ids
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.pairwise import merge_rankings
from influence_cli.methods.products import refuse_underflow
from influence_cli.methods.query_passes import block_size
from influence_cli.methods.request import ScoreRequest
from influence_cli.output.ranking import Ranking, refuse_non_finite


def rank_self_influence(
    source: GradientSource, request: ScoreRequest, ranking: Ranking, sort: str = "score"
) -> None:
    """Add sum over checkpoints of eta_i |g_i(z)|^2 of each training example to `ranking`, and as
    its one part the example's loss at the last checkpoint; sorted by `loss`, the other way round.

    It reads exact norms and losses alone. High scores: mislabelled and atypical examples. Of
    several ranks, rank 0 has the whole ranking.
    """
    source.ensure("train", request.checkpoints, list(request.columns), request.train, "norms")
    ranks = source.ranks
    total = len(request.train) * len(request.checkpoints) // ranks.count
    with source.reporter.progress("self-influence", total) as advance:
        blocks = cut_ids(request.train, block_size(source, request, 1, "norms"))
        for block in itertools.islice(blocks, ranks.rank, None, ranks.count):
            scores_N, losses_N, any_square = np.zeros(len(block)), np.zeros(len(block)), False
            for checkpoint, weight in zip(request.checkpoints, request.weights, strict=True):
                first = 0
                for rows in source.read("train", checkpoint, list(request.columns), block, "norms"):
                    last = first + len(rows.ids)
                    losses_N[first:last] = rows.losses.numpy()  # the last checkpoint's remain
                    for name, column in request.columns.items():
                        squares = rows.sqnorms[name].numpy()
                        with np.errstate(over="ignore", invalid="ignore"):  # the ranking refuses it
                            scores_N[first:last] += weight.of(column.names) * squares
                        any_square = any_square or bool(weight.of(column.names) and squares.any())
                    first = last
                    advance(len(rows.ids))
            refuse_underflow(float(scores_N.max()), any_square)
            refuse_non_finite(block, scores_N[None])
            keys_N, other_N = (scores_N, losses_N) if sort == "score" else (losses_N, scores_N)
            ranking.add(block, keys_N[None], other_N[None, None])
        report_numbers(source, request.checkpoints, list(request.columns))
        merge_rankings(ranks, ranking)
