"""Hugging Face models and their data, for a definition.py; and recording a Trainer's training.

`Task` holds what the functions of a definition return: model, examples, batches and losses.
Needs the extra `hf`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from influence_cli.integrations.extras import import_library
from influence_cli.integrations.hf_task import HuggingFaceTask as Task

__all__ = ["Task", "record"]


def record(
    trainer: Any,  # a transformers.Trainer
    dir: str | os.PathLike[str] | None = None,
    *,
    checkpoint_every: int | None = None,
    seed: int = 0,
    loss: Callable[[Any, Any], Tensor] | None = None,
    normalise: str | None = None,
) -> None:
    """Record the training that `trainer.train()` will run. Call it once, before.

    It writes trajectory.jsonl, checkpoints/ and optimizer/ into `dir` (default: the trainer's
    output_dir). A peft model's checkpoints are its adapter. `checkpoint_every`: steps between two
    checkpoints (default: as often as Trainer saves). `seed`: the dropout masks derive from it.
    `loss`: the loss of each example (B,), from the model's outputs and the labels, where
    definition.py has another one than `Task`. `normalise`: that of `Task`.

    Raises TrajectoryError for a trainer whose training can't be recorded.
    """
    import_library("transformers", "hf")
    from influence_cli.integrations.trainer_recording import TrainerRecording

    folder = Path(trainer.args.output_dir if dir is None else dir)
    trainer.add_callback(TrainerRecording(trainer, folder, checkpoint_every, seed, loss, normalise))
