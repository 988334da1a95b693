"""Self-influence: the score of an example on itself (TracIn: arXiv:2002.08484, section 4.1).

Letters: N train, P parts of a score (layers).
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import cut_ids
from influence_cli.cache.unit_file import Level
from influence_cli.extraction.run_notes import report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.inner_products import SquaredNorms
from influence_cli.methods.layer_aggregates import Aggregate, LayerScores
from influence_cli.methods.pairwise import merge_rankings
from influence_cli.methods.products import refuse_underflow
from influence_cli.methods.query_passes import block_size
from influence_cli.methods.request import ScoreRequest
from influence_cli.output.ranking import Ranking, refuse_non_finite
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint


def rank_self_influence(
    source: GradientSource,
    request: ScoreRequest,
    ranking: Ranking,
    sort: str = "score",
    rule: Aggregate | None = None,
    sqnorms: SquaredNorms | None = None,
) -> None:
    """Add sum over checkpoints of eta_i |g_i(z)|^2 of each training example to `ranking`, and as
    its one part the example's loss at the last checkpoint; sorted by `loss`, the other way round.
    `rule`: how the scores of layers become one; None: their sum. `sqnorms`: computes the squared
    norms from gradients; None: it reads exact norms and losses alone.

    High scores: mislabelled and atypical examples. Of several ranks, rank 0 has the whole ranking.
    """
    if rule is not None:
        rule.check_examples(len(request.train))
        request = dataclasses.replace(request, by="layer")
    layer_scores = LayerScores(len(request.parts) + 1, 1)  # the last row: losses
    reader = NormReader(source, request, sqnorms)
    source.ensure("train", request.checkpoints, list(request.columns), request.train, reader.level)
    ranks = source.ranks
    total = len(request.train) * len(request.checkpoints) // ranks.count
    with source.reporter.progress("self-influence", total) as advance:
        blocks = cut_ids(request.train, block_size(source, request, 1, reader.level))
        for block in itertools.islice(blocks, ranks.rank, None, ranks.count):
            scores_PN, losses_N = block_scores(reader, block, advance)
            refuse_non_finite(block, scores_PN[:1])
            if rule is None:
                add_entries(ranking, block, scores_PN[0], losses_N, sort)
            else:
                layer_scores.add(block, np.stack([*scores_PN[1:], losses_N])[:, None])
        report_numbers(source, request.checkpoints, list(request.columns))
        if rule is None:
            merge_rankings(ranks, ranking)
            return
        for partial in ranks.collect(layer_scores.blocks()):
            layer_scores.add(*partial)
    if ranks.rank == 0:
        layers = len(request.parts)
        scores_N, _ = layer_scores.aggregate(rule, layers, 0)
        add_entries(ranking, layer_scores.ids, scores_N, layer_scores.scores(layers, 0), sort)


def add_entries(
    ranking: Ranking, ids: np.ndarray, scores_N: np.ndarray, losses_N: np.ndarray, sort: str
) -> None:
    keys_N, other_N = (scores_N, losses_N) if sort == "score" else (losses_N, scores_N)
    ranking.add(ids, keys_N[None], other_N[None, None])


@dataclass(frozen=True)
class NormReader:
    """Reads the squared norms of training gradients: the stored ones, or those that `sqnorms`
    computes.
    """

    source: GradientSource
    request: ScoreRequest
    sqnorms: SquaredNorms | None

    @property
    def level(self) -> Level:
        return "norms" if self.sqnorms is None else "values"

    def read(self, checkpoint: Checkpoint, block: np.ndarray) -> Iterator[GradientRows]:
        columns = list(self.request.columns)
        for rows in self.source.read("train", checkpoint, columns, block, self.level):
            yield (
                rows
                if self.sqnorms is None
                else dataclasses.replace(rows, sqnorms=self.sqnorms(rows))
            )


def block_scores(
    reader: NormReader, block: np.ndarray, advance: Advance
) -> tuple[np.ndarray, np.ndarray]:
    """(1 + P, N) the scores of a block, then their parts; (N,) losses at the last checkpoint."""
    request, layers = reader.request, reader.request.parts
    scores_PN, losses_N = np.zeros((1 + len(layers), len(block))), np.zeros(len(block))
    any_square = False
    for checkpoint, weight in zip(request.checkpoints, request.weights, strict=True):
        first = 0
        for rows in reader.read(checkpoint, block):
            at = slice(first, first + len(rows.ids))
            losses_N[at] = rows.losses.numpy()  # the last checkpoint's remain
            for name, column in request.columns.items():
                squares = rows.sqnorms[name].numpy()
                part = 1 + layers.index(column.layer) if layers else 0
                with np.errstate(over="ignore", invalid="ignore"):  # the ranking refuses it
                    for index in {0, part}:
                        scores_PN[index, at] += weight.of(column.names) * squares
                any_square = any_square or bool(weight.of(column.names) and squares.any())
            first = at.stop
            advance(len(rows.ids))
    refuse_underflow(float(scores_PN[0].max()), any_square)
    return scores_PN, losses_N
