"""The scores of a file, for the queries and training examples of a run."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import UsageProblem, shown
from influence_cli.output.score_tables import ScoresOfQuery, read_score_file


def read_score_matrix(path: Path, queries: Ids, count: int) -> np.ndarray:
    """(Q, N) the scores of these queries and all training examples.

    Raises UsageProblem for a file without the score of one of these pairs.
    """
    scores_by_query = read_score_file(path)
    scores_QN = np.empty((len(queries), count))
    for row_N, query in zip(scores_QN, queries, strict=True):
        scores = scores_of_query(path, scores_by_query, int(query), count)
        missing = next((train for train in range(count) if train not in scores), None)
        if missing is not None:
            raise UsageProblem(
                f"{path} has no score of query {query} and training example {missing}",
                f"found: {len(scores):,} of {count:,} training examples of this query",
                "expected: all pairs, as `influence score --top all` writes them",
            )
        row_N[list(scores)] = list(scores.values())
    return scores_QN


def scores_of_query(
    path: Path, scores_by_query: Mapping[str, ScoresOfQuery], query: int, count: int
) -> dict[int, float]:
    """Training id -> score. Raises UsageProblem for an absent query, and for other ids than
    0 to `count` - 1.
    """
    scores = scores_by_query.get(str(query))
    if scores is None:
        raise UsageProblem(
            f"{path} has no scores of query {query}",
            f"found: {len(scores_by_query):,} queries, such as {next(iter(scores_by_query))}",
            "--queries selects the queries that the file has",
        )
    for train in scores:
        if not (train.isascii() and train.isdecimal() and int(train) < count):
            raise UsageProblem(
                f"{path}: query {query} has a score of {shown(train)}",
                f"expected: ids of training examples, 0 to {count - 1:,}",
            )
    return {int(train): score for train, score in scores.items()}
