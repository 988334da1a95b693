"""The cost of unroll for one request, measured on one of its steps.

Letters: K quantities, D numbers of a parameter.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from influence_cli.extraction.source import GradientSource
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.reverse.exact_batch import ExactBatch
from influence_cli.methods.reverse.exact_steps import ExactSteps
from influence_cli.methods.reverse.reverse_pass import adjoint_size, queries_per_pass
from influence_cli.progress import format_bytes, format_duration
from influence_cli.run.replay import Replay

REPEATS = 3  # the shortest of them counts
ADJOINT_COPIES = 3  # that a step back holds at once


@dataclass(frozen=True)
class UnrollCost:
    """The cost of a request. `step_seconds`: of a plain training step. `back_seconds`: of the same
    step in reverse, with the queries of one pass. `memory`: bytes of the query gradients.
    """

    steps: int
    passes: int
    step_seconds: float
    back_seconds: float
    replay: bool
    memory: int

    @property
    def trainings(self) -> float:
        """As a multiple of training these steps."""
        return self.passes * (self.back_seconds / self.step_seconds + self.replay)

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds * self.trainings

    def describe(self, queries: str) -> str:
        """The cost in one line."""
        replays = f", {self.passes} of them to re-run the steps" if self.replay else ""
        return (
            f"about {self.trainings:.1f} trainings of its {self.steps:,} steps for {queries}"
            f"{replays}: {format_duration(self.seconds)} ({self.step_seconds * 1e3:.3g} ms a step, "
            f"{self.back_seconds * 1e3:.3g} ms back), {format_bytes(self.memory)} in memory"
        )


def measure_cost(source: GradientSource, request: ScoreRequest, steps: ExactSteps) -> UnrollCost:
    """The cost, from a few runs of the middle step at the first checkpoint."""
    plan = steps.plan
    source.run.model.at(plan.segments[0].checkpoint)
    source.budget.sizes("train", list(plan.columns))
    number = plan.steps[len(plan.steps) // 2]
    dtype = torch.float64 if source.settings.storage_dtype == torch.float64 else torch.float32
    most = queries_per_pass(source, plan, request)
    count = len(request.queries)
    quantities = 1 if request.sum_queries else min(most, count)
    return UnrollCost(
        len(plan.steps),
        1 if request.sum_queries else -(-count // most),
        shortest_seconds(plain_step(source, number)),
        shortest_seconds(step_back(steps, number, quantities, dtype, request.by == "layer")),
        steps.replay,
        ADJOINT_COPIES * quantities * adjoint_size(source, plan) * dtype.itemsize,
    )


def plain_step(source: GradientSource, number: int) -> Callable[[], object]:
    """A function that computes the gradient of a recorded step."""
    replay = Replay(
        source.run,
        lambda ids: source.extractor.batches.of("train", ids)[0],
        source.budget.requested_batch_size,
    )
    return lambda: replay.gradient(number)


def step_back(
    steps: ExactSteps, number: int, quantities: int, dtype: torch.dtype, by_parameter: bool
) -> Callable[[], None]:
    """A function that takes random directions through the curvature of a recorded step."""
    plan, device = steps.plan, steps.source.device
    examples = plan.trajectory.lines[number].examples
    weights_B = torch.from_numpy(plan.trajectory.weights(number)).to(device, dtype)
    u = {
        name: torch.randn(quantities, column.numel, dtype=dtype, device=device)
        for name, column in plan.columns.items()
    }

    def run() -> None:
        parts = steps.curvature.parts(examples, weights_B, quantities)
        ExactBatch(parts, dtype, by_parameter).through(u, dict.fromkeys(u, 1.0))

    return run


def shortest_seconds(work: Callable[[], object]) -> float:
    """The shortest time of a few runs, after a first one that is not timed."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
