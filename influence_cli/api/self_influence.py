"""Self-influence: checks the arguments, then ranks training examples."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.api import specs
from influence_cli.api.method_options import Given
from influence_cli.api.score import ScoreArguments, ScorePlan, check_method_arguments
from influence_cli.methods.table import SELF_METHODS
from influence_cli.output.columns import SELF_KEYS

if TYPE_CHECKING:
    from influence_cli.api.id_selection import IdSelection
    from influence_cli.api.opening import Opened
    from influence_cli.cache.id_blocks import Ids
    from influence_cli.output.columns import Row
    from influence_cli.output.ranking import Entry
    from influence_cli.output.table_record import MakeRecord
    from influence_cli.parallel.shards import Shard


def plan_self(
    method: str,
    options: Given,
    scored: ScoreArguments,
    top: str = "10",
    part: "Shard | None" = None,
    candidates: bool = False,
) -> ScorePlan:
    """Check the arguments of `self`. Needs no torch. `candidates`: whether rows are given."""
    chosen = SELF_METHODS[specs.one_of("--method", method, SELF_METHODS)]
    own_options = check_method_arguments(chosen, options, scored, {"--candidates": candidates})
    limit, rule = specs.top(top), specs.aggregate(scored.aggregate)
    specs.check_aggregate(rule, part)
    return ScorePlan(chosen, own_options, scored, limit, part, rule)


def check_sort(sort: str | None) -> str:
    """`--sort`: the column that ranks the rows."""
    return specs.one_of("--sort", sort or SELF_KEYS[0], SELF_KEYS)


@dataclass(frozen=True)
class SelfWork:
    """The ranking of a plan on an opened run. `train`: the shard's ids."""

    opened: "Opened"
    plan: ScorePlan
    sort: str
    train: "Ids"
    made: "MakeRecord"

    @property
    def columns(self) -> tuple[str, ...]:
        from influence_cli.output.columns import self_columns

        return self_columns(self.opened.has_ids)

    def compute(self) -> "Iterator[Entry]":
        """The first entries by score or loss. Rank 0 has them. An empty shard has none."""
        from influence_cli.api.requests import score_request
        from influence_cli.methods.self_influence import rank_self_influence
        from influence_cli.output.ranking import FullRanking, Ranking, TopRanking

        if not len(self.train):
            return iter(())
        plan, source, top = self.plan, self.opened.gradients, self.plan.top
        request = score_request(
            self.opened, plan.method, plan.options, self.train, range(0), plan.scored
        )
        ranking: Ranking = (
            FullRanking(1, 1, signed=False) if top is None else TopRanking(1, 1, top, signed=False)
        )
        sqnorms = plan.method.open_sqnorms(source, request) if plan.method.open_sqnorms else None
        rank_self_influence(source, request, ranking, self.sort, plan.rule, sqnorms)
        return ranking.entries(0)

    def rows(self, entries: "Iterable[Entry]") -> "Iterator[Row]":
        from influence_cli.output.columns import self_rows

        return self_rows(entries, self.sort, self.opened.describe, self.opened.has_ids)


def open_self(opened: "Opened", plan: ScorePlan, sort: str, train: "IdSelection") -> SelfWork:
    """The work for a plan, with its ids. It computes nothing yet."""
    from influence_cli.api.table_request import record_maker

    all_ids = opened.ids("--train", train, "train")
    train_ids = opened.shard_ids(all_ids, plan.part)
    scored = plan.scored
    arguments = {"command": "self", "method": plan.method.name, "options": plan.options}
    arguments |= {"lr": scored.lr, "lr_weights": scored.lr_weights, "sort": sort}
    arguments |= {"aggregate": scored.aggregate}
    made = record_maker(opened, arguments, all_ids, range(0), plan.part, plan.top)
    return SelfWork(opened, plan, sort, train_ids, made)
