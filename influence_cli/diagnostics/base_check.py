"""Checks the weights below adapters: model() must bring the same ones each time."""

import math
from collections.abc import Sequence

from influence_cli.diagnostics.finding import Finding
from influence_cli.extraction.source import GradientSource
from influence_cli.run.adapters import digest_base
from influence_cli.run.checkpoint_loading import list_tensors, map_keys
from influence_cli.run.checkpoints import Checkpoint, read_header
from influence_cli.run.parameters import build_model


def check_base(source: GradientSource, checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Builds the model again, where checkpoints are adapters. Random weights below an adapter give
    scores of a model that nobody trained.
    """
    adapters = [checkpoint for checkpoint in checkpoints if checkpoint.is_adapter]
    if not adapters:
        return []
    model = build_model(source.run.definition)
    keys = map_keys(read_header(adapters[-1].files), model).file_keys
    is_same = digest_base(list_tensors(model), keys) == adapters[-1].base
    note = (
        "" if is_same else "model() builds other weights each time: load the base model's weights"
    )
    return [
        Finding("base", "train", "weights below adapters", 0.0 if is_same else math.inf, 0.0, note)
    ]
