"""Reads the learning rate in the scheduler.pt of a Hugging Face Trainer."""

from pathlib import Path

import torch

from influence_cli.errors import CheckpointError, listed

SCHEDULER = "scheduler.pt"


def read_scheduler_rate(path: Path) -> float | None:
    """The rate of the step that follows the checkpoint: a Trainer advances its schedule before it
    saves. At the end of a schedule that is often 0. None where the file names none.

    Raises CheckpointError: a damaged file, one with more than plain values, groups that differ.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        rates = content.get("_last_lr") if isinstance(content, dict) else None
        values = {float(rate) for rate in rates} if isinstance(rates, list | tuple) else set()
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        reason = str(error).strip().partition("\n")[0][:200]
        raise CheckpointError(
            f"{path.parent.name}/{path.name} can't be read: {type(error).__name__} {reason}",
            "expected: numbers, which torch.load(weights_only=True) reads",
            "--lr X does without",
        ) from error
    if len(values) > 1:
        raise CheckpointError(
            f"{path.parent.name}/{path.name} has several learning rates",
            f"found: {listed(sorted(values))}; expected: one for all parameters",
            "--lr X gives one; a trajectory.jsonl can hold one per parameter group",
        )
    return values.pop() if values else None
