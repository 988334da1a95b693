"""How well scores tell a few wrong examples from many right ones.

Each figure is a mean over the wrong examples, so that a bootstrap over them gives its interval.

Shape letters: N examples, W wrong ones.
"""

import numpy as np


def place_among_right(scores_N: np.ndarray, is_wrong_N: np.ndarray) -> np.ndarray:
    """(W,) the share of right examples with a lower score; half of those with an equal score count.

    The mean is ROC-AUC (Hanley & McNeil 1982, doi:10.1148/radiology.143.1.7063747).
    """
    right = np.sort(scores_N[~is_wrong_N])
    wrong_W = scores_N[is_wrong_N]
    below, up_to = (np.searchsorted(right, wrong_W, side=side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(right))


def find_in_first(scores_N: np.ndarray, is_wrong_N: np.ndarray, share: float) -> np.ndarray:
    """(W,) 1 for a wrong example among the first `share` of all by falling score, else 0.

    Where the cut divides equal scores, each of them has the same part of the places.
    """
    places = max(1, round(share * len(scores_N)))
    cut = np.partition(scores_N, len(scores_N) - places)[len(scores_N) - places]
    part = (places - (scores_N > cut).sum()) / (scores_N == cut).sum()
    wrong_W = scores_N[is_wrong_N]
    return (wrong_W > cut) + part * (wrong_W == cut)
