"""The one owner of the model's weights.

Every change of the weights goes through this class: a checkpoint, a step of a replay, a saved state
of a replay. So the class always knows which checkpoint the model holds, if any.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from influence_cli.run.checkpoint_loading import load_checkpoint
from influence_cli.run.checkpoints import Checkpoint


class LoadedModel:
    """The run's model. `module` is the model itself; `checkpoint` is what its weights are, or None
    where they are the weights of no checkpoint: before the first load, and inside a replay."""

    def __init__(self, module: nn.Module, checkpoints: Sequence[Checkpoint] = ()) -> None:
        """`checkpoints`: the run's. If the run mixes whole models and adapters, the weights of
        model() are copied, because a whole model overwrites what lies below an adapter.
        """
        self.module = module
        kinds = {checkpoint.is_adapter for checkpoint in checkpoints}
        self._original: dict[str, Tensor] = {}
        if len(kinds) > 1:
            self._original = {key: value.clone() for key, value in module.state_dict().items()}
        self.checkpoint: Checkpoint | None = None
        self._base: Checkpoint | None = None  # the last checkpoint that was loaded: its buffers

    def at(self, checkpoint: Checkpoint) -> nn.Module:
        """The model with the weights of this checkpoint. Raises CheckpointError: weights that are
        not finite, or tied names with different values."""
        if self.checkpoint != checkpoint:
            self.checkpoint = self._base = None
            if checkpoint.is_adapter and self._original:
                self.module.load_state_dict(self._original)
            load_checkpoint(checkpoint, self.module)
            self.checkpoint = self._base = checkpoint
        return self.module

    def forget(self) -> None:
        """The next use loads its checkpoint from the disk, whose files may have been replaced."""
        self.checkpoint = self._base = None

    def at_any(self, default: Checkpoint) -> nn.Module:
        """The model with its current weights; before the first load with those of `default`."""
        return self.module if self._base is not None else self.at(default)

    def restore(
        self, base: Checkpoint, parameters: Sequence[Tensor], values: Sequence[Tensor]
    ) -> None:
        """Puts saved values into these parameters. Everything else has the values of `base`."""
        if self._base != base:
            self.at(base)
        self.set_values(parameters, values)

    def set_values(self, parameters: Iterable[Tensor], values: Iterable[Tensor]) -> None:
        """Puts these values into the parameters."""
        self.checkpoint = None
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    def step(self, optimizers: Iterable[Optimizer]) -> None:
        """One training step: each optimizer updates its parameters by their gradients."""
        self.checkpoint = None
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
