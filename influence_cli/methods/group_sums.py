"""--group-by: sums of scores over groups of training examples.

Letters: N train, Q query, P parts of a score, G groups.
"""

from collections.abc import Iterator

import numpy as np

from influence_cli.methods.request import Groups
from influence_cli.parallel.ranks import Ranks


def sum_groups(
    groups: Groups,
    scored: Iterator[tuple[np.ndarray, np.ndarray]],
    turns: int,
    ranks: Ranks,
    shape: tuple[int, int],
) -> np.ndarray:
    """(1 + P, Q, G) sums of all blocks. They are added block by block in the order of the ids, so
    that sums do not depend on the number of ranks. `turns`: blocks of the
    rank that has the most. `shape`: P, Q."""
    parts, width = shape
    sums = np.zeros((parts + 1, width, len(groups.names)))
    for _ in range(turns):
        block = next(scored, None)
        for block_sums in ranks.gather(group_sums(groups, *block) if block else None):
            if block_sums is not None:
                numbers, values = block_sums
                sums[:, :, numbers] += values
    return sums


def group_sums(
    groups: Groups, ids: np.ndarray, totals: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The groups (G,) of a block, and the sums (1 + P, Q, G) of its scores (1 + P, Q, N)."""
    numbers, inverse = np.unique(groups.of[ids], return_inverse=True)
    sums = np.zeros((*totals.shape[:2], len(numbers)))
    np.add.at(sums.transpose(2, 0, 1), inverse, totals.transpose(2, 0, 1))
    return numbers, sums
