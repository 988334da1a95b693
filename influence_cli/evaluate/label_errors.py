"""Ranks training examples by self-influence and by loss, and counts how many of the wrong labels
are among the first.

Letters: N training examples, W wrong labels.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from influence_cli.errors import UsageProblem, shown
from influence_cli.evaluate.correlation import interval
from influence_cli.evaluate.declaration import ALL, EvaluationRequest, Figure, describe_cost
from influence_cli.evaluate.detection import find_in_first, place_among_right
from influence_cli.evaluate.flipped_labels import replay_flipped
from influence_cli.evaluate.mislabel import MislabelOptions
from influence_cli.evaluate.predicted_effects import UnrankedScores
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.self_influence import rank_self_influence
from influence_cli.methods.table import METHODS

SHARES = (5, 10, 20, 30)  # percent of the examples that a user looks at
LOSS = "loss"  # in the column `method`: examples ranked by their loss at the last checkpoint
RANDOM = "random"  # in a random order: what chance finds


def evaluate(source: GradientSource, request: EvaluationRequest) -> Iterator[Figure]:
    """ROC-AUC, and the share of wrong labels among the first examples; of each method, and of the
    loss. `--by layer`: also of the self-influence in each layer.
    """
    options = request.options
    assert isinstance(options, MislabelOptions)
    if (options.wrong is None) == (options.flip is None):
        raise UsageProblem(
            "mislabel does not know which labels are wrong"
            if options.wrong is None
            else "--wrong and --flip both say which labels are wrong",
            "expected: one of --wrong FILE and --flip P",
        )
    count = len(source.run.train)
    checkpoints = {checkpoint.step: checkpoint for checkpoint in request.checkpoints}
    if options.wrong is not None:
        wrong, cost = read_ids(options.wrong, count), describe_cost(0, None)
    else:
        assert options.flip is not None
        flipped = replay_flipped(source, request, options.flip)
        source, wrong, cost = flipped.source, flipped.ids, flipped.cost
        checkpoints = {checkpoint.step: checkpoint for checkpoint in source.run.checkpoints}
    is_wrong_N = np.zeros(count, bool)
    is_wrong_N[wrong] = True
    losses_N = np.empty(0)
    figures: list[Figure] = []
    for name, score_request in request.requests.items():
        points = tuple(checkpoints[checkpoint.step] for checkpoint in score_request.checkpoints)
        complete = dataclasses.replace(score_request, checkpoints=points, train=range(count))
        for part, part_request in parts_of(complete, request.by).items():
            scores_N, losses_N = self_influences(source, METHODS[name], part_request)
            figures += detection_figures(name, part, scores_N, is_wrong_N, cost, request.seed)
    yield from figures
    yield from detection_figures(LOSS, ALL, losses_N, is_wrong_N, cost, request.seed)
    order_N = np.random.default_rng(request.seed).permutation(count).astype(np.float64)
    yield from detection_figures(RANDOM, ALL, order_N, is_wrong_N, cost, request.seed)


def read_ids(path: Path, count: int) -> np.ndarray:
    """The ids in a file, one a line; `#` begins a comment.

    Raises UsageProblem for a file that can't be read, another text, an id out of range, no id, or
    all ids.
    """
    ids = set()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageProblem(f"--wrong {path}: {error}", "expected: a text file of ids") from error
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) < 19 and int(text) < count):
            raise UsageProblem(
                f"--wrong {path}, line {number}: {shown(text)} is no id of a training example",
                f"expected: one id a line, 0 to {count - 1:,}",
            )
        ids.add(int(text))
    if not 0 < len(ids) < count:
        raise UsageProblem(
            f"--wrong {path} names {len(ids):,} of the {count:,} training examples",
            "expected: at least one, and not all",
        )
    return np.array(sorted(ids))


def parts_of(request: ScoreRequest, by: str | None) -> dict[str, ScoreRequest]:
    """The requests to rank: of each layer alone, with --by layer, and of all."""
    if by is None:
        return {ALL: request}
    layers = dict.fromkeys(column.layer for column in request.columns.values())
    parts = {
        layer: {name: column for name, column in request.columns.items() if column.layer == layer}
        for layer in layers
    }
    requests = {
        layer: dataclasses.replace(request, columns=columns) for layer, columns in parts.items()
    }
    return {**requests, ALL: request}


def self_influences(
    source: GradientSource, method: Method, request: ScoreRequest
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) self-influence of each training example, and (N,) its loss at the last checkpoint."""
    ranking = UnrankedScores(1, 1)
    sqnorms = method.open_sqnorms(source, request) if method.open_sqnorms else None
    rank_self_influence(source, request, ranking, sqnorms=sqnorms)
    scores, losses = zip(
        *((entry.score, entry.parts[0]) for entry in ranking.entries(0)), strict=True
    )
    return np.array(scores), np.array(losses)


def detection_figures(
    method: str, part: str, scores_N: np.ndarray, is_wrong_N: np.ndarray, cost: str, seed: int
) -> Iterator[Figure]:
    """`auc`, and `found-5%` and so on. The intervals: bootstrap over the wrong examples."""
    values = {"auc": place_among_right(scores_N, is_wrong_N)}
    values |= {
        f"found-{percent}%": find_in_first(scores_N, is_wrong_N, percent / 100)
        for percent in SHARES
    }
    for name, values_W in values.items():
        low, high = interval(values_W, seed)
        yield Figure(method, name, float(values_W.mean()), low, high, len(values_W), cost, part)
