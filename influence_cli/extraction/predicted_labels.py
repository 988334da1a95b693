"""Queries without a label: they get the label that the model predicts for them.

The last selected checkpoint predicts it: the largest of `outputs(model, batch)`, (B, C). Each query
is a batch of its own, so the label does not depend on the other queries.
"""

import numpy as np
import torch

from influence_cli.cache.id_blocks import Ids, spread_evenly
from influence_cli.errors import DefinitionError, counted, shown
from influence_cli.extraction.captures import ORDER_SAMPLE
from influence_cli.extraction.run_notes import SAMPLE
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.batches import to
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure

NOTED = 3  # queries that a note names
REMEDY = "def relabel(example, label): return an example with this label, a class number from 0"


def predict_missing_labels(source: GradientSource, checkpoint: Checkpoint, ids: Ids) -> None:
    """Give the queries of `ids` that come from the command line and have no label a predicted one.
    A note names it. Every rank calls it. Where training examples have none either, as texts of a
    language model, there is none to predict.

    Raises DefinitionError: the definition can't predict a label, or can't set one.
    """
    examples = source.run.query
    if examples.given is None or not source.run.train.label(0):
        return
    count = len(examples)
    # a probe and the look for zeros read others than the requested ones, too
    others = [*range(min(ORDER_SAMPLE, count)), *spread_evenly(count, SAMPLE)]
    read = np.union1d(np.asarray(ids), others).astype(np.int64).tolist()
    unlabelled = [index for index in read if not examples.label(index)]
    if not unlabelled:
        return
    labels = source.ranks.share([predict_label(source, checkpoint, index) for index in unlabelled])
    examples.set_labels(dict(zip(unlabelled, labels, strict=True)))
    source.run.model.at(source.run.checkpoints[0])  # where a run without predictions is probed
    note_labels(source, checkpoint, [index for index in unlabelled if index in set(ids)])


def predict_label(source: GradientSource, checkpoint: Checkpoint, index: int) -> int:
    """The class that the model predicts for a query."""
    examples, definition = source.run.query, source.run.definition
    headline = f"query {index} of {examples.source} has no label"
    missing = [f"{name}()" for name in ("outputs", "relabel") if not definition.has(name)]
    if missing:
        raise DefinitionError(
            headline,
            f"{definition.path.name} lacks {' and '.join(missing)}, so influence can't predict one",
            f"add a label to the row; or add {REMEDY}; "
            "def outputs(model, batch): return one number per class, (B, C)",
        )
    relabelled = definition.call("relabel", examples.item(index), 0)  # so that it can be collated
    batches = source.extractor.batches
    batch = to(examples.collate([relabelled]), batches.device, batches.cast)
    try:
        with torch.no_grad():
            outputs_BC = definition.raw("outputs")(source.run.model.at(checkpoint), batch)
    except (Exception, SystemExit) as error:
        raise describe_failure(definition, "outputs", error) from error
    shape = tuple(outputs_BC.shape) if isinstance(outputs_BC, torch.Tensor) else ()
    if len(shape) != 2 or shape[0] != 1 or shape[1] == 1:
        raise DefinitionError(
            headline,
            f"found: outputs() returned {shape or shown(outputs_BC)} for one example; "
            "expected: (1, C) with a number for each of C classes",
            "add a label to the row: influence predicts labels of classifiers only",
        )
    if not bool(outputs_BC.isfinite().all()):
        raise DefinitionError(
            headline,
            f"found: outputs() at {checkpoint.name} that are not finite, which predict none",
            "add a label to the row",
        )
    return int(outputs_BC.argmax())


def note_labels(source: GradientSource, checkpoint: Checkpoint, queries: list[int]) -> None:
    """Say which labels were predicted: of a few queries, then how many more there are."""
    examples, reporter = source.run.query, source.reporter
    for index in queries[:NOTED]:
        reporter.note(
            f"query {index} has no label: influence explains the label {examples.label(index)!r}, "
            f"which {checkpoint.name} predicts"
        )
    if (more := len(queries) - NOTED) > 0:
        queries_text = counted(more, "more query has", "more queries have")
        reporter.note(f"{queries_text} no label: influence explains the predicted label of each")
