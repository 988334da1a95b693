"""Seeds torch's generators before each forward pass of a recorded training."""

import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from influence_cli.errors import TrajectoryError
from influence_cli.run.training_mode import draws_masks, list_eval_modules, seed_generators


class ForwardSeeds:
    """A hook of a model. It acts on forward passes in train mode with autograd on.

    `seed`: the seeds of all forward passes derive from it and from the step. None: the hook seeds
    nothing, and warns once where the model draws masks that nobody can draw again.
    `on_first`: runs before the first forward pass of each step.
    """

    def __init__(self, model: nn.Module, seed: int | None, on_first: Callable[[], None]) -> None:
        self._model, self._seed, self._on_first = model, seed, on_first
        self._is_first = True
        self._has_warned = False
        self._is_begun = False  # begin() seeded the micro-batch that runs
        self.step = 0
        self.seeds: list[int] = []  # of the forward passes since the last step
        self.eval_modules: list[str] = []  # at the last forward pass
        self._handle = model.register_forward_pre_hook(self._before_forward)

    def remove(self) -> None:
        self._handle.remove()

    def begin_micro_batch(self) -> None:
        """Seed the forward passes up to `end_micro_batch`, however many they are."""
        self._is_begun = True
        self._begin_pass()

    def end_micro_batch(self) -> None:
        self._is_begun = False

    def describe_step(self, sizes: list[int]) -> dict[str, Any]:  # Any: JSON values
        """The keys of the step's line. `sizes`: entries of each micro-batch.

        Raises TrajectoryError unless each micro-batch had one forward pass.
        """
        if self._seed is None or not (sizes or self.seeds):
            return {}
        if len(self.seeds) != len(sizes):
            raise TrajectoryError(
                f"step {self.step}: {len(self.seeds)} forward passes in train mode, "
                f"and {len(sizes)} micro-batches",
                "expected: one forward pass of the recorded model per micro-batch; "
                "a replay draws the masks of each again",
                "call add(indices, weights) after each micro-batch, and step() after the last",
                "several forward passes in one micro-batch: call begin_micro_batch() before them",
                "call the model in eval mode or under torch.no_grad() for anything else",
            )
        line: dict[str, Any] = {"seeds": self.seeds}
        if len(sizes) > 1:
            line["micro_batches"] = sizes
        if self.eval_modules:
            line["eval"] = self.eval_modules
        return line

    def begin_step(self, step: int) -> None:
        self.step, self.seeds = step, []
        self._is_first, self._is_begun = True, False

    def _before_forward(self, model: nn.Module, _: object) -> None:
        if self._is_begun or not model.training or not torch.is_grad_enabled():
            return
        self._begin_pass()
        if self._seed is None and not self._has_warned:
            self._has_warned = True
            if draws_masks(model):
                warnings.warn(
                    "the model draws random masks (dropout) that the recorder does not record, so "
                    "--replay can't repeat this training; TrajectoryRecorder(..., seed=0) "
                    "seeds each forward pass and records the seeds",
                    stacklevel=2,
                )

    def _begin_pass(self) -> None:
        if self._is_first:
            self._is_first = False
            self._on_first()
        if self._seed is not None:
            self.seeds.append(derive_seed(self._seed, self.step, len(self.seeds)))
            self.eval_modules = list_eval_modules(self._model)
            seed_generators(self.seeds[-1], next(self._model.parameters()).device)


def derive_seed(seed: int, step: int, number: int) -> int:
    """A seed of 32 bits, which is what torch's CPU generator uses."""
    digest = hashlib.blake2b(f"{seed} {step} {number}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
