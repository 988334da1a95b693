"""Compares the scores of files, runs and methods: correlations per query, and common top examples.

Shape letters: M common pairs of a query, Q queries, N training examples.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from influence_cli.errors import UsageProblem, shown
from influence_cli.evaluate.agreement import AgreementOptions
from influence_cli.evaluate.declaration import (
    EvaluationRequest,
    Figure,
    ScoreTable,
    describe_cost,
)
from influence_cli.evaluate.effect_correlations import CORRELATIONS, FigureMaker
from influence_cli.evaluate.predicted_effects import UnrankedScores
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.declaration import Method
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.table import METHODS
from influence_cli.output.score_tables import ScoresOfQuery
from influence_cli.progress import Reporter
from influence_cli.run.run import Run

ScoresByQuery = dict[str, ScoresOfQuery]


def compare_tables(
    tables: Sequence[ScoreTable], options: AgreementOptions, seed: int, reporter: Reporter
) -> Iterator[Figure]:
    """The figures of each two tables. Raises UsageProblem for a single one."""
    sizes = parse_counts(options.top_k)
    if len(tables) < 2:
        raise UsageProblem(
            f"agreement compares at least two tables of scores, {len(tables)} given",
            f"found: {', '.join(table.name for table in tables) or 'none'}",
            "expected: influence evaluate RUN agreement A B, or two --method NAME",
        )
    scores = [(table.name, table.read()) for table in tables]
    figures: list[Figure] = []
    for (one, ones), (other, others) in itertools.combinations(scores, 2):
        name = f"{one}, {other}"
        figures += compare_scores(name, ones, others, sizes, seed, reporter)
    yield from figures


def compare_methods(source: GradientSource, request: EvaluationRequest) -> Iterator[Figure]:
    """The figures of each two methods of the request, over all training examples."""
    options = request.options
    assert isinstance(options, AgreementOptions)
    tables = tables_of_run(source, request.requests)
    yield from compare_tables(tables, options, request.seed, source.reporter)


def tables_of_run(
    source: GradientSource, requests: Mapping[str, ScoreRequest], folder: str = ""
) -> list[ScoreTable]:
    """One table of each method. `folder`: of the run, for their names."""
    return [
        ScoreTable(f"{folder} {name}".strip(), partial(score_all, source, METHODS[name], request))
        for name, request in requests.items()
    ]


def check_same_examples(one: Run, other: Run) -> None:
    """Raises UsageProblem where two runs have another example under the same id."""
    for split in ("train", "query"):
        ones, others = one.examples(split), other.examples(split)
        ids = range(min(len(ones), len(others)))
        differing = np.flatnonzero((ones.digests(ids) != others.digests(ids)).numpy())
        if len(differing) or len(ones) != len(others):
            raise UsageProblem(
                f"{one.folder} and {other.folder} have other examples in {split}_data()",
                f"found: {len(ones):,} and {len(others):,} examples"
                + (f"; example {differing[0]} differs" if len(differing) else ""),
                "expected: runs on the same data in the same order",
            )


def parse_counts(text: str) -> list[int]:
    """`10,50` as rising numbers. Raises UsageProblem for another text."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) < 10**9 for part in parts):
        raise UsageProblem(f"--top-k {shown(text)}", "expected: counts from 1, such as 10,50")
    return sorted({int(part) for part in parts})


def score_all(source: GradientSource, method: Method, request: ScoreRequest) -> ScoresByQuery:
    """The scores of all pairs, by query."""
    request = dataclasses.replace(request, train=range(len(source.run.train)))
    scores: ScoresByQuery = {}
    for scored in method.score(source, request, UnrankedScores):
        for position, query in enumerate(scored.queries or ()):
            entries = scored.ranking.entries(position)
            scores[str(query)] = {str(entry.train): entry.score for entry in entries}
    return scores


def compare_scores(
    name: str,
    one: ScoresByQuery,
    other: ScoresByQuery,
    sizes: Sequence[int],
    seed: int,
    reporter: Reporter,
) -> Iterator[Figure]:
    """Spearman and Pearson over the pairs that both have, and the common ones of the top k. The
    noise is the standard deviation of Spearman's correlation between random orders.

    Per query and their mean over queries. Raises UsageProblem where they have no pair in common.
    """
    queries = [query for query in one if one[query].keys() & other.get(query, {}).keys()]
    if not queries:
        raise UsageProblem(
            f"{name}: no query and training example is in both",
            f"found: {len(one):,} and {len(other):,} queries",
            "expected: scores of the same run",
        )
    note_missing_pairs(reporter, name, one, other)
    common = {query: sorted(one[query].keys() & other[query].keys()) for query in queries}
    counts_Q = np.array([len(trains) for trains in common.values()])
    maker = FigureMaker(queries, describe_cost(0, None), seed)
    for figure, correlate in CORRELATIONS.items():
        values = [
            correlate(*(np.array([table[query][t] for t in trains]) for table in (one, other)))
            for query, trains in common.items()
        ]
        yield from maker.mean(name, figure, np.array(values), counts_Q)
    yield from maker.mean(name, "noise", 1 / np.sqrt(np.maximum(1, counts_Q - 1)), counts_Q)
    for size in sizes:
        overlaps = [overlap_of_tops(one[query], other[query], size) for query in queries]
        yield from maker.mean(name, f"overlap-{size}", np.array(overlaps), size)


def note_missing_pairs(
    reporter: Reporter, name: str, one: ScoresByQuery, other: ScoresByQuery
) -> None:
    """A note where only one of the two has some pairs."""
    pairs = [
        {(query, train) for query, scores in table.items() for train in scores}
        for table in (one, other)
    ]
    lonely = len(pairs[0] ^ pairs[1])
    if lonely:
        reporter.note(
            f"{name}: {lonely:,} pairs are in one of the two only, so the correlations leave them "
            "out. `score --top all` writes all pairs"
        )


def overlap_of_tops(one: ScoresOfQuery, other: ScoresOfQuery, size: int) -> float:
    """The share of common examples among the `size` highest scores of each, or of all if one has
    fewer. Equal scores are in the order of their ids.
    """
    size = min(size, len(one), len(other))
    tops = [
        {train for train, _ in sorted(scores.items(), key=rank_key)[:size]}
        for scores in (one, other)
    ]
    return len(tops[0] & tops[1]) / size


def rank_key(item: tuple[str, float]) -> tuple[float, int, str]:
    """Falling scores; equal ones by id: numbers as numbers, names of groups as texts."""
    train, score = item
    return -score, int(train) if train.isdecimal() else -1, train
