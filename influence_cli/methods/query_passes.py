"""How the queries of a request are divided, so that memory stays flat in their number.

A pass is a block of queries whose gradients are in memory together. A round has one pass or more,
and goes over the training examples once.
"""

from dataclasses import dataclass

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.unit_file import Level
from influence_cli.extraction.memory_budget import floor_power_of_two
from influence_cli.extraction.source import GradientSource
from influence_cli.methods.request import ScoreRequest
from influence_cli.progress import format_bytes

QUERY_BYTES = 2 << 30  # gradients of a pass in memory, over all checkpoints
TRAIN_BYTES = 2 << 30  # gradients of a block of a round of several passes, at one checkpoint
TOTAL_BYTES = 16 << 20  # scores of a block of training examples
ROUND_BYTES = 256 << 20  # the same, of a round of several passes
LEAST_BLOCK = 256  # training examples


@dataclass(frozen=True)
class PassPlan:
    """The passes and the rounds of a request.

    `disk_bytes`: of the queries' gradients in a temporary folder, 0 where a round has one pass.
    `cached`: training gradients are kept, so each is computed once, whatever the rounds.
    """

    queries: Ids
    pass_size: int
    round_size: int
    disk_bytes: int
    cached: bool

    @property
    def passes(self) -> list[Ids]:
        return cut(self.queries, self.pass_size)

    @property
    def rounds(self) -> list[Ids]:
        """The queries of each round."""
        return cut(self.queries, self.round_size)

    @property
    def captures(self) -> int:
        """How often `score` computes the gradient of a training example at a checkpoint."""
        return 1 if self.cached else len(self.rounds)


def plan_passes(
    source: GradientSource, request: ScoreRequest, query_bytes: int, cached: bool | None = None
) -> PassPlan:
    """`query_bytes`: of one query at one checkpoint. `cached`: None for what the source does.

    The gradients of a pass fit into QUERY_BYTES over all checkpoints, and its scores of a block of
    4,096 examples into 8 TOTAL_BYTES. --sum-queries makes one pass. With a cache a round is a pass.
    Without one, a round has as many passes as its scores, and those of its groups, allow: of
    LEAST_BLOCK examples they fit into ROUND_BYTES.
    """
    queries, cached = request.queries, source.cache is not None if cached is None else cached
    count, scores = len(queries), 8 * (1 + len(request.parts))
    at_each = query_bytes * len(request.checkpoints)
    most = min(QUERY_BYTES // at_each, 8 * TOTAL_BYTES // (4096 * scores))
    size = max(1, count if request.sum_queries else most)
    groups = len(request.groups.names) if request.groups else 0
    passes = 1 if cached else ROUND_BYTES // (scores * max(LEAST_BLOCK, groups)) // size
    round_size = size * max(1, passes)
    several = size < min(count, round_size)
    disk_bytes = min(count, round_size) * at_each if several else 0
    return PassPlan(queries, size, round_size, disk_bytes, cached)


def note_passes(source: GradientSource, plan: PassPlan) -> None:
    if plan.disk_bytes:
        times = "once" if plan.captures == 1 else f"{plan.captures} times"
        source.reporter.note(
            f"the {len(plan.queries):,} queries take {len(plan.passes)} passes: their gradients "
            f"({format_bytes(plan.disk_bytes)}) go to a temporary folder, and the gradient of each "
            f"training example is computed {times}"
        )
    elif plan.captures > 1:
        source.reporter.note(
            f"the queries take {plan.captures} passes, and with --cache none each pass computes "
            "the gradients of all training examples: a cache computes them once"
        )


def block_size(
    source: GradientSource, request: ScoreRequest, queries: int, level: Level = "values"
) -> int:
    """Training examples of a block: some for each query, whole units, and work for several
    ranks.
    """
    most = TOTAL_BYTES // (8 * queries * (1 + len(request.parts)))
    shared = min(floor_power_of_two(most), floor_power_of_two(len(request.train) // 64))
    unit = source.budget.unit_size("train", list(request.columns), level)
    return max(min(4096, floor_power_of_two(4 * queries)), LEAST_BLOCK, unit, shared)


def round_block_size(source: GradientSource, request: ScoreRequest, queries: int) -> int:
    """The same for a round of several passes: the gradients of a block fit into TRAIN_BYTES, its
    scores into ROUND_BYTES.
    """
    names = list(request.columns)
    widening = max(1, 4 // source.settings.storage_dtype.itemsize)
    example = source.budget.sizes("train", names).example_bytes(names) * widening
    scores = 8 * queries * (1 + len(request.parts))
    most = min(TRAIN_BYTES // max(1, example), ROUND_BYTES // scores)
    return min(
        floor_power_of_two(most), max(LEAST_BLOCK, floor_power_of_two(len(request.train) // 16))
    )


def cut(ids: Ids, size: int) -> list[Ids]:
    """The ids in parts of `size`."""
    return [ids[first : first + size] for first in range(0, len(ids), size)]
