"""The baseline `random`: scores that know nothing of model, example or query.

score(z, q) = a number between -1 and 1, drawn from (seed, q, z) alone

Any other method must beat it. The scores do not depend on the batch size, ranks or shards.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from influence_cli.methods.declaration import Method

if TYPE_CHECKING:
    import numpy as np

    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.pairwise import Advance, RankingFactory
    from influence_cli.methods.request import ScoredQueries, ScoreRequest


def score(
    source: "GradientSource", request: "ScoreRequest", new_ranking: "RankingFactory"
) -> "Iterator[ScoredQueries]":
    """Scores of every requested training example, ranked per query."""
    from influence_cli.methods.pairwise import score_without_gradients

    def load_queries(ids: "Ids") -> "list[int]":
        return [-1] if request.sum_queries else [int(query) for query in ids]

    def score_blocks(
        queries: list[int], blocks: "Iterator[np.ndarray]", advance: "Advance"
    ) -> "Iterator[np.ndarray]":
        for ids in blocks:
            yield draw_scores(request.seed, queries, ids)[None]
            advance(len(ids))

    return score_without_gradients(source, request, new_ranking, load_queries, score_blocks)


def draw_scores(seed: int, queries: list[int], ids: "np.ndarray") -> "np.ndarray":
    """(Q, N) float64 in [-1, 1): for each pair 53 bits of a hash of (seed, query, example).

    The hash is the output function of SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195),
    once for each of the three numbers. Query -1 stands for all queries as one.
    """
    import numpy as np

    def mix(value: "np.ndarray") -> "np.ndarray":
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))

    seeds = mix(np.array([seed], np.uint64))
    hash_Q = mix(seeds ^ np.array(queries, np.int64).astype(np.uint64))
    hash_QN = mix(hash_Q[:, None] ^ ids.astype(np.uint64)[None, :])
    return (hash_QN >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


METHOD = Method(
    name="random",
    help="baseline of random scores",
    question="None: a baseline that every other method must beat.",
    needs="nothing",
    cost="no gradients",
    source="baseline",
    score=score,
    parts=(),
    checkpoints="one",
    weighted=False,
    caches_train=False,
    refuses={
        "--normalize": "its scores are no inner products",
        "--layers": "it reads no gradients",
        "--project": "it reads no gradients",
    },
)
