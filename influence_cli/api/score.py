"""Scores of a method: checks the arguments, then computes the ranked rows."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from influence_cli.api import specs
from influence_cli.api.method_options import Given, method_options, refuse_flags
from influence_cli.methods.table import METHODS

if TYPE_CHECKING:
    from influence_cli.api.id_selection import IdSelection
    from influence_cli.api.opening import Opened
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.methods.declaration import Method
    from influence_cli.methods.layer_aggregates import Aggregate
    from influence_cli.methods.request import ScoredQueries, ScoreRequest
    from influence_cli.output.columns import Row
    from influence_cli.output.ranking import Entry
    from influence_cli.output.table_record import MakeRecord
    from influence_cli.parallel.shards import Shard


@dataclass(frozen=True)
class ScoreArguments:
    """How scores are made, split and summed. Names and values are those of the flags."""

    sum_queries: bool = False
    group_by: str | None = None
    by: str | None = None
    lr: float | None = None
    lr_weights: str | None = None
    normalize: bool = False
    aggregate: str | None = None


PLAIN = ScoreArguments()


@dataclass(frozen=True)
class ScorePlan:
    """Checked arguments. `top`: rows of each kind and query; None: all. `rule`: how the scores of
    layers become one; None: their sum.
    """

    method: "Method"
    options: object
    scored: ScoreArguments
    top: int | None
    part: "Shard | None"
    rule: "Aggregate | None"


def check_method_arguments(
    method: "Method", options: Given, scored: ScoreArguments, given: Mapping[str, bool]
) -> object:
    """The method's options. `given`: whether other flags are given, that some methods do not have.

    Raises UsageProblem for arguments that the method does not have.
    """
    own_options = method_options(method, options)
    of_scores = {
        "--lr": scored.lr is not None,
        "--lr-weights": scored.lr_weights is not None,
        "--normalize": scored.normalize,
    }
    refuse_flags(method, {**given, **of_scores})
    return own_options


def plan_scores(
    method: str,
    options: Given,
    scored: ScoreArguments,
    top: str = "10",
    part: "Shard | None" = None,
    given: Mapping[str, bool] | None = None,
) -> ScorePlan:
    """Check the arguments of `score`. Needs no torch. `given`: see `check_method_arguments`."""
    chosen = METHODS[specs.one_of("--method", method, METHODS)]
    limit, rule = specs.top(top), specs.aggregate(scored.aggregate)
    specs.check_by(scored.by, chosen, scored.group_by)
    own_options = check_method_arguments(
        chosen, options, scored, {**(given or {}), "--shard": part is not None}
    )
    specs.check_shard(part, scored.group_by)
    specs.check_aggregate(rule, part, chosen, scored.by)
    return ScorePlan(chosen, own_options, scored, limit, part, rule)


@dataclass(frozen=True)
class ScoreWork:
    """The scores of a plan on an opened run. `train`: the shard's ids. `made`: makes the record."""

    opened: "Opened"
    plan: ScorePlan
    train: "Ids"
    queries: "Ids"
    made: "MakeRecord"

    @property
    def columns(self) -> tuple[str, ...]:
        from influence_cli.output.columns import score_columns

        return score_columns(self.plan.scored.by, self.opened.has_ids)

    @cached_property
    def request(self) -> "ScoreRequest":
        from influence_cli.api.requests import score_request

        plan = self.plan
        return score_request(
            self.opened, plan.method, plan.options, self.train, self.queries, plan.scored
        )

    @property
    def groups(self) -> list[str] | None:
        """The names that replace training ids with --group-by."""
        return self.request.groups.names if self.request.groups else None

    def compute(self) -> "Iterator[ScoredQueries]":
        """Ranked scores, some queries at a time. An empty shard has none."""
        from influence_cli.methods.layer_aggregates import score_layers
        from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

        top = self.plan.top

        def new_ranking(queries: int, parts: int) -> Ranking:
            return FullRanking(queries, parts) if top is None else TopRanking(queries, parts, top)

        if len(self.train):
            method, source = self.plan.method, self.opened.gradients
            yield from score_layers(method, source, self.request, new_ranking, self.plan.rule)

    def rows(self, results: "Iterable[ScoredQueries]") -> "Iterator[Row]":
        """The rows of the table, query by query."""
        from influence_cli.output.columns import score_rows

        for scored in results:
            yield from score_rows(
                scored.ranking,
                scored.queries,
                self.request.by,
                scored.parts,
                self.groups,
                self.opened.describe,
                scored.split,
                self.opened.has_ids,
            )


def open_scores(
    opened: "Opened", plan: ScorePlan, queries: "IdSelection", train: "IdSelection"
) -> ScoreWork:
    """The work for a plan, with its ids. It computes nothing yet but labels of given queries."""
    from influence_cli.api.table_request import record_maker

    all_ids = opened.ids("--train", train, "train")
    train_ids = opened.shard_ids(all_ids, plan.part)
    query_ids = opened.query_ids(queries)
    arguments = {"method": plan.method.name, "options": plan.options, **vars(plan.scored)}
    arguments = {"command": "score", **arguments}
    made = record_maker(opened, arguments, all_ids, query_ids, plan.part, plan.top)
    return ScoreWork(opened, plan, train_ids, query_ids, made)


def keep_parts(scored: "ScoredQueries") -> "ScoredQueries":
    """The same scores, with the parts that `split` computes: it needs the queries' gradients,
    which are in memory only until the next queries are scored.
    """
    from influence_cli.output.columns import SPLIT_ENTRIES

    if scored.split is None:
        return scored
    parts = {}
    for position in range(scored.ranking.queries):
        entries = scored.ranking.entries(position)
        while page := list(itertools.islice(entries, SPLIT_ENTRIES)):
            for entry, entry_parts in zip(page, scored.split(position, page), strict=True):
                parts[position, entry.train] = entry_parts

    def split(position: int, entries: "Iterable[Entry]") -> list[list[tuple[str, float]]]:
        return [parts[position, entry.train] for entry in entries]

    return replace(scored, split=split)
