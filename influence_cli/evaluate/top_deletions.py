"""Trains without the top proponents, or opponents, of each query.

change[k, q] = f(q; trained without the top k of q) - f(q; trained on all), f = -m: larger is better

Below 0 for proponents of a good method, above 0 for its opponents.

Shape letters: K numbers of left-out examples, S seeds, Q queries.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from influence_cli.errors import UsageProblem, counted, shown
from influence_cli.evaluate.declaration import (
    TRAINING,
    EvaluationRequest,
    Figure,
    describe_cost,
)
from influence_cli.evaluate.deletion import DeletionOptions
from influence_cli.evaluate.effect_correlations import FigureMaker
from influence_cli.evaluate.result_log import Record, total_seconds
from influence_cli.evaluate.retraining import noise_of
from influence_cli.evaluate.score_files import scores_of_query
from influence_cli.evaluate.subset_training import SubsetTrainings, values_of
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import KINDS, TopRanking
from influence_cli.output.score_tables import ScoresOfQuery, read_score_file
from influence_cli.progress import Reporter

SIZE = re.compile(r"([0-9]{1,9})|([0-9]{1,2}(?:\.[0-9]{1,9})?)%")  # of --top-k: 10 or 2.5%
Tops = list[dict[str, list[int]]]  # of each query: its top examples of each kind, best first


def evaluate(source: GradientSource, request: EvaluationRequest) -> Iterator[Figure]:
    """The curve of each method and kind, per query and its mean over queries, and the mean of the
    curve (`auc`); then the noise of the measurements.
    """
    options = request.options
    assert isinstance(options, DeletionOptions)
    count = len(source.run.train)
    sizes = parse_sizes(options.top_k, count)
    trainings = SubsetTrainings(
        source, request, "deletion", options.renormalize, options.retrainings
    )
    tops = {
        name: rank_tops(source, METHODS[name], score_request, max(sizes.values()))
        for name, score_request in request.requests.items()
    }
    for file in request.score_files:
        scores_by_query = read_score_file(file)
        tops[str(file)] = [
            tops_of_scores(file, scores_by_query, int(query), count) for query in request.queries
        ]
    for name, tops_of_method in tops.items():
        note_short_tops(source.reporter, name, tops_of_method, max(sizes.values()))
    figures: list[Figure] = []
    for name, tops_of_method in tops.items():
        figures += measure_curves(trainings, request, name, tops_of_method, sizes)
    cost = describe_cost(2, total_seconds([trainings.baseline]))
    maker = FigureMaker(list(request.queries), cost, request.seed)
    yield from figures
    yield from maker.mean(TRAINING, "noise", noise_of(trainings.baseline), 2)


def parse_sizes(text: str, count: int) -> dict[str, int]:
    """`10,5%` -> its parts as numbers of examples, rising.

    Raises UsageProblem for another text, or a number that leaves out no example, or all.
    """
    sizes: dict[str, int] = {}
    for part in (part.strip() for part in text.split(",")):
        match = SIZE.fullmatch(part)
        if not match:
            raise UsageProblem(
                f"--top-k {shown(text)} can't be read at {shown(part)}",
                "expected: counts or shares such as 10,20,5%",
            )
        size = int(match[1]) if match[1] else round(float(match[2]) / 100 * count)
        if not 0 < size < count:
            raise UsageProblem(
                f"--top-k {part} leaves out {size:,} of the {count:,} training examples",
                f"expected: 1 to {count - 1:,} examples",
            )
        sizes[part] = size
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def rank_tops(source: GradientSource, method: Method, request: ScoreRequest, top: int) -> Tops:
    """The top examples of each query."""
    request = dataclasses.replace(request, train=range(len(source.run.train)))
    tops: Tops = []
    for scored in method.score(source, request, partial(TopRanking, k=top)):
        for query in range(scored.ranking.queries):
            of_kind: dict[str, list[int]] = {kind: [] for kind in KINDS}
            for entry in scored.ranking.entries(query):
                of_kind[entry.kind].append(entry.train)
            tops.append(of_kind)
    return tops


def tops_of_scores(
    file: Path, scores_by_query: Mapping[str, ScoresOfQuery], query: int, count: int
) -> dict[str, list[int]]:
    """The examples of a query in a score file: scores above 0 falling, those below 0 rising."""
    scores = scores_of_query(file, scores_by_query, query, count)
    signed = (
        sorted((-sign * score, train) for train, score in scores.items() if sign * score > 0)
        for sign in (1, -1)
    )
    tops = [[train for _, train in pairs] for pairs in signed]
    return dict(zip(KINDS, tops, strict=True))


def note_short_tops(reporter: Reporter, method: str, tops: Tops, top: int) -> None:
    """A note where fewer examples are proponents, or opponents, than are to be left out."""
    for kind in KINDS:
        short = sum(len(of_kind[kind]) < top for of_kind in tops)
        if short:
            reporter.note(
                f"{method}: {short} of {counted(len(tops), 'query', 'queries')} have fewer than "
                f"{top:,} {kind}s; deletion leaves out all that they have"
            )


def measure_curves(
    trainings: SubsetTrainings,
    request: EvaluationRequest,
    method: str,
    tops: Tops,
    sizes: dict[str, int],
) -> Iterator[Figure]:
    """Figures `proponents-10`, ..., `proponents-auc`, and the same for opponents."""
    nothing = np.empty(0, np.int64)
    omissions = [nothing] + [
        np.sort(np.array(of_kind[kind][:size], np.int64))
        for kind in KINDS
        for size in sizes.values()
        for of_kind in tops
    ]
    records = trainings.measure(omissions, f"deletion of {method}")
    complete_Q, *after = values_of(records, len(trainings.seeds)).mean(axis=1)
    own_query = np.arange(len(tops))
    shape = (len(KINDS), len(sizes), len(tops))
    own_values = np.array(after)[np.arange(len(after)), np.tile(own_query, len(after) // len(tops))]
    changes = complete_Q - own_values.reshape(shape)
    maker = FigureMaker(list(request.queries), cost_of(trainings, records), request.seed)
    for kind, changes_KQ in zip(KINDS, changes, strict=True):
        for size, changes_Q in zip(sizes, changes_KQ, strict=True):
            yield from maker.mean(method, f"{kind}s-{size}", changes_Q, len(trainings.seeds))
        yield from maker.mean(method, f"{kind}s-auc", changes_KQ.mean(axis=0), len(sizes))


def cost_of(trainings: SubsetTrainings, records: Sequence[Record]) -> str:
    """Of the trainings of one method; one that two queries share counts once."""
    distinct = {(record["without"], record["seed"]): record for record in records}
    return describe_cost(len(distinct), total_seconds(distinct.values()))
