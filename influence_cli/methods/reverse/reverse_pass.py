"""The reverse pass: backpropagates the queries' gradients through the training steps.

    for step in reversed steps:                   StepSource
        effects = propagate(step, adjoint)        optimizer_adjoint.py
        sums.add(effects)                         occurrences.py

It needs nothing of size D x D. Letters: Q queries, D numbers of a parameter.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.id_blocks import Ids
from influence_cli.extraction.run_notes import refuse_zeros, report_numbers
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import LEAST, MOST
from influence_cli.methods.pairwise import dtype_of, mean_query_row, query_rows
from influence_cli.methods.query_passes import QUERY_BYTES
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.reverse.occurrences import NewSums, Sums
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint
from influence_cli.methods.reverse.resume import PassProgress
from influence_cli.methods.reverse.segments import ReversePlan
from influence_cli.methods.reverse.stability import check_finite, state_norms
from influence_cli.methods.reverse.steps import PassSettings, StepEffects, StepSource, propagate
from influence_cli.storage.scratch import ScratchFolder

# the queries' gradients at the end of training -> the effects of each step, last step first
StepEffectsOf = Callable[[GradientRows], Iterator[StepEffects]]


def run_passes(
    source: GradientSource,
    request: ScoreRequest,
    plan: ReversePlan,
    new_sums: NewSums[Sums],
    prepare: Callable[[Path], StepEffectsOf],
) -> Iterator[tuple[Ids, Sums]]:
    """Per pass its query ids, and what `new_sums` collected. As many queries as fit make a pass.

    `prepare`: gets a folder for temporary files, runs once. Raises GradientError (divergence).
    """
    for note in plan.notes:
        source.reporter.note(note)
    source.ensure("query", [plan.end], list(plan.columns), request.queries)
    size, queries = queries_per_pass(source, plan, request), request.queries
    passes = [queries[first : first + size] for first in range(0, len(queries), size)]
    load_rows = mean_query_row if request.sum_queries else query_rows
    trained = dataclasses.replace(request, columns=plan.columns)
    with ScratchFolder(Path(tempfile.gettempdir())) as folder:
        step_effects = prepare(folder)
        for number, ids in enumerate(passes, start=1):
            rows = load_rows(source, trained, plan.end, ids)
            sums = new_sums(len(rows.ids), folder)
            label = f", queries {number} of {len(passes)}" if len(passes) > 1 else ""
            any_effect = False
            doing = f"backpropagating through training{label}"
            with source.reporter.progress(doing, plan.count_occurrences()) as advance:
                for effects in step_effects(rows):
                    sums.add(effects)
                    any_effect = any_effect or any(map(torch.any, effects.values.values()))
                    advance(len(effects.examples), f"step {effects.step}")
            points, columns = plan.checkpoints, list(plan.columns)
            if not any_effect:
                refuse_zeros(source, "train", points[0], columns)
            report_numbers(source, points, columns)
            yield ids, sums


def backpropagate(
    source: GradientSource,
    request: ScoreRequest,
    plan: ReversePlan,
    steps: StepSource,
    progress: PassProgress,
    rows: GradientRows,
    renormalize: bool,
) -> Iterator[StepEffects]:
    """The effects of each step on the queries of `rows`, last step first.

    It resumes where an interrupted run with the same `progress` was. The adjoint is linear in the
    queries' gradients, so it propagates tiny and huge ones divided by a power of two.
    """
    gradients = query_gradients(rows, plan, source.device)
    scale_Q = scale_to_one(gradients)
    adjoint = end_adjoint(plan, gradients, steps.end_statistics(gradients))
    start_norms = state_norms(adjoint)
    layers = parameters_of_layers(plan) if request.by == "layer" else {}
    yield from progress.restore(adjoint, layers)
    stop = progress.stop
    if stop < plan.steps.stop:
        source.reporter.note(
            f"resuming below step {stop:,}: an interrupted run saved the effects of later steps"
        )
    settings = PassSettings(len(rows.ids), working_dtype(rows), bool(layers))
    reversed_steps = steps.reversed_steps(stop, settings)
    for effects in propagate(reversed_steps, adjoint, start_norms, renormalize, layers):
        if scale_Q is not None:
            effects = effects.times(scale_Q)
            for value in effects.values.values():
                check_finite(value, effects.step, effects.checkpoint)
        if effects.step < progress.reached:
            yield effects
        progress.add(adjoint, effects)
    progress.discard()


def end_adjoint(
    plan: ReversePlan, gradients: dict[str, Tensor], statistics: dict[str, Tensor]
) -> Adjoint:
    """The adjoint at the end of training: the queries' gradients, by running statistics too, and no
    dependence on the optimizer's state.
    """
    moment = {name: torch.zeros_like(gradients[name]) for name in plan.with_momentum}
    second = {
        name: torch.zeros_like(gradients[name]) for name in (plan.columns if plan.adam else ())
    }
    return Adjoint(gradients, moment, second, statistics)


def query_gradients(
    rows: GradientRows, plan: ReversePlan, device: torch.device
) -> dict[str, Tensor]:
    """(Q, D) per parameter: a dense copy of the queries' gradients."""
    dtype = working_dtype(rows)
    return {
        name: rows.forms[name].to(device, dtype).dense().values.clone() for name in plan.columns
    }


def scale_to_one(gradients: dict[str, Tensor]) -> Tensor | None:
    """Divide each query's gradient by a power of two, in place, so that its largest number is
    about 1. Returns the powers (Q,) float64; None where no gradient is tiny or huge.
    """
    sizes = [value.abs().amax(1) for value in gradients.values()]
    largest_Q = torch.stack(sizes).amax(0).cpu().double()  # not every device has float64
    extreme_Q = (largest_Q > 0) & ((largest_Q < LEAST) | (largest_Q > MOST))
    if not extreme_Q.any():
        return None
    powers_Q = torch.ldexp(torch.ones_like(largest_Q), torch.frexp(largest_Q).exponent)
    scale_Q = powers_Q.where(extreme_Q, 1.0)
    for value in gradients.values():
        value.copy_(value.cpu().double() / scale_Q[:, None])
    return scale_Q


def parameters_of_layers(plan: ReversePlan) -> dict[str, list[str]]:
    """Layer -> its parameters."""
    layers: dict[str, list[str]] = {}
    for name, column in plan.columns.items():
        layers.setdefault(column.layer, []).append(name)
    return layers


def queries_per_pass(source: GradientSource, plan: ReversePlan, request: ScoreRequest) -> int:
    """How many queries fit into memory together."""
    if request.sum_queries:
        return len(request.queries)
    return max(1, QUERY_BYTES // (adjoint_size(source, plan) * 8))


def adjoint_size(source: GradientSource, plan: ReversePlan) -> int:
    """The numbers of one query's adjoint: a_θ, with momentum also a_m, with Adam also a_v."""
    return sum(
        source.settings.width(column) * (1 + (name in plan.with_momentum) + plan.adam)
        for name, column in plan.columns.items()
    )


def working_dtype(rows: GradientRows) -> torch.dtype:
    """float64 if the gradients have it, else float32."""
    wide = any(dtype_of(form) == torch.float64 for form in rows.forms.values())
    return torch.float64 if wide else torch.float32
