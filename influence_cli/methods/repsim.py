"""The baseline RepSim: similarity of representations (Hanawa et al. 2021, arXiv:2006.04528).

score(z, q) = h(z) . h(q) / (|h(z)| |h(q)|), and 0 where a feature vector is 0

h(x) is `features(model, batch)` of the definition at one checkpoint; by default the input of the
model's last Linear layer, averaged over positions. Score > 0: the model represents both examples
alike. It uses no labels and no gradients, so a proponent is similar, but did not necessarily lower
the query's loss. With --sum-queries the score is the mean of the cosines.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from influence_cli.methods.declaration import Method

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from influence_cli.cache.id_blocks import Ids
    from influence_cli.extraction.source import GradientSource
    from influence_cli.methods.pairwise import Advance, RankingFactory
    from influence_cli.methods.request import ScoredQueries, ScoreRequest


def score(
    source: "GradientSource", request: "ScoreRequest", new_ranking: "RankingFactory"
) -> "Iterator[ScoredQueries]":
    """Cosines of every requested training example, ranked per query.

    Raises DefinitionError where the model has no Linear layer and the definition no `features`.
    """
    from influence_cli.errors import GradientError
    from influence_cli.extraction.features import FeatureExtractor
    from influence_cli.methods.pairwise import score_without_gradients

    extractor = FeatureExtractor(source)
    (checkpoint,) = request.checkpoints
    zero_queries: list[int] = []
    any_feature: set[str] = set()  # splits with a feature other than 0

    def unit_vectors(split: str, ids: "Ids") -> "Tensor":
        features_NF = extractor.features(split, checkpoint, ids)
        largest_N = features_NF.abs().amax(1, keepdim=True)
        wrong = (~largest_N.isfinite()).flatten().nonzero().flatten().tolist()
        if wrong:
            raise GradientError(
                f"the features are not finite at {checkpoint.name}, example {ids[wrong[0]]} of "
                f"{source.run.examples(split).source}",
                "look at that example; --precision float64 helps against overflow",
            )
        if bool(largest_N.any()):
            any_feature.add(split)
        scaled_NF = features_NF / largest_N.where(largest_N > 0, 1)  # squares can't underflow
        norms_N = scaled_NF.norm(dim=1, keepdim=True)
        return scaled_NF / norms_N.where(norms_N > 0, 1)

    def load_queries(ids: "Ids") -> "Tensor":
        units_QF = unit_vectors("query", ids)
        zero_queries.extend(
            int(query) for query, unit_F in zip(ids, units_QF, strict=True) if not unit_F.any()
        )
        return units_QF.mean(0, keepdim=True) if request.sum_queries else units_QF

    def score_blocks(
        units_QF: "Tensor", blocks: "Iterator[np.ndarray]", advance: "Advance"
    ) -> "Iterator[np.ndarray]":
        for ids in blocks:
            yield (units_QF @ unit_vectors("train", ids).T)[None].numpy()
            advance(len(ids))

    for scored in score_without_gradients(source, request, new_ranking, load_queries, score_blocks):
        report_features(source, unit_vectors, any_feature, zero_queries)
        yield scored


def report_features(
    source: "GradientSource",
    unit_vectors: "Callable[[str, Ids], Tensor]",
    any_feature: set[str],
    zero_queries: list[int],
) -> None:
    """Refuse features that are all zero, of what was read and of a sample; note zero queries and
    half precision.
    """
    import numpy as np

    from influence_cli.cache.id_blocks import spread_evenly
    from influence_cli.errors import GradientError, listed
    from influence_cli.extraction.run_notes import SAMPLE, note_rounded_features

    for split in ("train", "query"):
        ids = np.array(spread_evenly(len(source.run.examples(split)), SAMPLE))
        if split in any_feature or len(ids) < 2 or bool(unit_vectors(split, ids).any()):
            continue
        raise GradientError(
            f"every feature of {source.run.examples(split).source} is 0",
            "expected: features that differ between examples",
            "look at features(), or at the input of the last Linear layer",
        )
    if zero_queries:
        source.reporter.note(
            f"the features of query {listed(zero_queries)} are 0, so all scores of it are 0"
        )
    note_rounded_features(source)


METHOD = Method(
    name="repsim",
    help="baseline: cosine of the model's features",
    question="Does the model represent this example like the query?",
    needs="one checkpoint; features(model, batch), or a model with a Linear layer",
    cost="one forward pass per example",
    source="Hanawa et al. 2021, arXiv:2006.04528",
    score=score,
    parts=(),
    checkpoints="one",
    weighted=False,
    normalized=True,
    caches_train=False,
    refuses={
        "--layers": "it reads features, not gradients",
        "--project": "it reads features, not gradients",
    },
)
