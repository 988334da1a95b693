"""Records the training of a Lightning Trainer. Needs the extra `lightning`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from influence_cli.errors import TrajectoryError
from influence_cli.integrations.indexed_data import (
    KEY,
    IndexedBatch,
    IndexedCollator,
    IndexedDataset,
    check_map_style,
)
from influence_cli.run.recorder import TrajectoryRecorder

CLIP_EPSILON = 1e-6  # that torch's clip_grad_norm_ adds to a norm


class Recorder(Callback):
    """A callback that records each optimizer step: Trainer(callbacks=[Recorder("my_run")]).

    It writes trajectory.jsonl, checkpoints/ and optimizer/ into `dir` (default: the folder of the
    trainer's logger). `checkpoint_every`: steps between two checkpoints (default: an epoch).
    `reduction`: training_step() returns the mean of the examples' losses, or their sum. `seed`: the
    dropout masks derive from it.

    Raises TrajectoryError for a training that can't be recorded.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        reduction: str = "mean",
        seed: int = 0,
    ) -> None:
        self.dir, self.checkpoint_every = dir, checkpoint_every
        self.reduction, self.seed = reduction, seed
        self.recorder: TrajectoryRecorder | None = None
        self._indices: Tensor | None = None  # of the batch that trains

    # ------------------------------------------------------------ data
    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Wraps the source of training batches, and the hook that they pass first."""
        if stage != "fit":
            return
        refuse_unsupported(trainer, pl_module)
        source = trainer.fit_loop._data_source
        load = source.dataloader

        def load_indexed() -> Any:
            return add_indices(load())

        source.dataloader = load_indexed
        for owner in filter(None, (pl_module, trainer.datamodule)):
            self._wrap_transfer(owner)

    def _wrap_transfer(self, owner: Any) -> None:  # Any: a module or a datamodule
        before_transfer = owner.on_before_batch_transfer

        def split(batch: Any, dataloader_idx: int) -> Any:
            if isinstance(batch, IndexedBatch):
                batch, self._indices = batch.batch, batch.indices
            elif isinstance(batch, Mapping) and KEY in batch:
                self._indices = batch[KEY]
                batch = {key: value for key, value in batch.items() if key != KEY}
            return before_transfer(batch, dataloader_idx)

        owner.on_before_batch_transfer = split

    # ------------------------------------------------------------ recording
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.recorder = TrajectoryRecorder(
            Path(self.dir or trainer.log_dir or trainer.default_root_dir),
            pl_module,
            trainer.optimizers[0],
            self.checkpoint_every or steps_of_epoch(trainer),
            self.reduction,
            start=trainer.global_step,
            save_optimizer=True,
            seed=self.seed,
        )
        self.recorder.__enter__()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        if self.recorder is not None:
            self.recorder.begin_micro_batch()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if self.recorder is None or self._indices is None:
            return
        count = len(self._indices) if self.reduction == "mean" else 1
        weight = 1 / (max(1, count) * trainer.accumulate_grad_batches)
        self.recorder.add(self._indices.cpu(), [weight] * len(self._indices))
        self._indices = None

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Lightning clips afterwards, by the norm that is computed here."""
        if self.recorder is None:
            return
        factor = 1.0
        if trainer.gradient_clip_val:
            parameters = [own for group in optimizer.param_groups for own in group["params"]]
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            factor = min(1.0, trainer.gradient_clip_val / (float(norm) + CLIP_EPSILON))
        self.recorder.step(clip=factor)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close(type(exception))

    def _close(self, kind: type[BaseException] | None) -> None:
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            recorder.__exit__(kind)


def add_indices(loader: Any) -> Any:  # Any: the user's
    """The loader, whose batches now carry the indices of their examples."""
    if not isinstance(loader, DataLoader):
        raise TrajectoryError(
            f"the training data of Lightning is a {type(loader).__name__}",
            "expected: one torch DataLoader",
        )
    if not isinstance(loader.dataset, IndexedDataset):
        check_map_style(loader.dataset, "Lightning")
        # DataLoader forbids to assign `dataset` because its sampler knows the length, which stays
        object.__setattr__(loader, "dataset", IndexedDataset(loader.dataset))
        loader.collate_fn = IndexedCollator(loader.collate_fn)
    return loader


def steps_of_epoch(trainer: Any) -> int:  # Any: a lightning.Trainer
    batches = trainer.num_training_batches
    every = trainer.accumulate_grad_batches
    return max(1, -(-int(batches) // every)) if batches != float("inf") else 100


def refuse_unsupported(trainer: Any, pl_module: Any) -> None:  # Any: Lightning's
    """Raises TrajectoryError for a training whose steps are no sum of examples' gradients here."""
    problems = {
        f"{trainer.world_size} processes": trainer.world_size > 1,
        "manual optimization": not pl_module.automatic_optimization,
        "clipping by value": trainer.gradient_clip_algorithm == "value",
        "16-mixed, whose gradient scaler skips steps": trainer.precision == "16-mixed",
    }
    if unsupported := [name for name, is_used in problems.items() if is_used]:
        raise TrajectoryError(
            f"Recorder does not support: {', '.join(unsupported)}",
            "expected: one process, automatic optimization, clipping by norm",
            "TrajectoryRecorder records any loop (docs/trajectory-format.md)",
        )
