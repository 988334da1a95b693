"""Drift: how far the gradients of the same examples turn between two neighbouring checkpoints.

A segment uses the gradients of its first checkpoint, so drift says how far to trust its steps.

Letters: B examples.
"""

import numpy as np
import torch

from influence_cli.cache.gradient_rows import GradientRows, concat_rows
from influence_cli.cache.id_blocks import spread_evenly
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.form_ops import distance
from influence_cli.methods.reverse.segments import ReversePlan, Segment
from influence_cli.run.checkpoints import Checkpoint

SEGMENTS, EXAMPLES = 16, 8  # the sample


def fill_cache(source: GradientSource, plan: ReversePlan) -> None:
    """Compute the gradients of a plan that the cache lacks, and report the drift."""
    source.ensure_each("train", plan.examples_by_checkpoint, list(plan.columns))
    if (note := measure_drift(source, plan)) is not None:
        source.reporter.note(note)


def measure_drift(source: GradientSource, plan: ReversePlan) -> str | None:
    """The drift of some examples of some segments, as a note; None where each step is saved."""
    following = [*(segment.checkpoint for segment in plan.segments[1:]), plan.end]
    pairs = [
        (segment, after)
        for segment, after in zip(plan.segments, following, strict=True)
        if segment.stop - segment.first > 1 and after != segment.checkpoint
    ]
    cosines: list[tuple[float, Segment]] = []
    for position in spread_evenly(len(pairs), SEGMENTS):
        segment, after = pairs[position]
        # a zero gradient has no direction
        cosines += [(c, segment) for c in segment_cosines(source, plan, segment, after) if c == c]
    if not cosines:
        return None
    least, where = min(cosines, key=lambda pair: pair[0])
    median = float(np.median([value for value, _ in cosines]))
    return (
        "drift: gradients of the same examples at neighbouring checkpoints have a median cosine of "
        f"{median:.2f}, the smallest {least:.2f} (after step {where.checkpoint.step:,}). All steps "
        "between two checkpoints use gradients of the first one"
    )


def segment_cosines(
    source: GradientSource, plan: ReversePlan, segment: Segment, after: Checkpoint
) -> list[float]:
    """(B,) cosines of some examples' gradients at a segment's checkpoint and at the next one."""
    columns = list(plan.columns)
    examples = plan.examples(segment)
    ids = examples[spread_evenly(len(examples), EXAMPLES)]
    source.ensure("train", [after], columns, ids)

    def read_rows(checkpoint: Checkpoint) -> GradientRows:
        return concat_rows(list(source.read("train", checkpoint, columns, ids)))

    first, second = read_rows(segment.checkpoint), read_rows(after)
    first_B, second_B = (
        torch.stack([rows.sqnorms[name] for name in columns]).sum(0) for rows in (first, second)
    )
    distances_B = torch.stack(
        [distance(first.forms[name], second.forms[name]).square() for name in columns]
    ).sum(0)
    cosines_B = (first_B + second_B - distances_B) / (2 * (first_B * second_B).sqrt())
    return [float(cosine) for cosine in cosines_B]
