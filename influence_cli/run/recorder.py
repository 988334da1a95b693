"""Records a training: a line per optimizer step, and checkpoints to resume from."""

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import TrajectoryError
from influence_cli.run.checkpoint_loading import check_fits_model, load_checkpoint
from influence_cli.run.forward_seeds import ForwardSeeds
from influence_cli.run.optimizer_state import (
    checkpoint_name,
    describe_write_error,
    list_checkpoints,
    load_state,
    optimizer_name,
    report_write_errors,
    save_checkpoint,
    save_state,
)
from influence_cli.run.parameters import unwrap_model
from influence_cli.run.recorded_entries import Numbers, read_entries, read_integers, read_number
from influence_cli.run.recording_folder import read_earlier_part
from influence_cli.run.recording_header import (
    JSON,
    build_header,
    list_differences,
    read_group_options,
)
from influence_cli.storage.atomic import (
    LineLog,
    remove_stale_files,
    remove_stale_siblings,
    write_bytes,
)
from influence_cli.storage.json_text import seal_json


class TrajectoryRecorder:
    """A context around a training loop. Call `step()` before each `optimizer.step()`; leaving the
    context saves the last checkpoint.

    `start`: the number of steps that model and optimizer have taken (a resumed training).
    `steps`: `start` plus the steps recorded since.
    `seed`: seed torch's generators before each forward pass in train mode, and record the seeds, so
    that a replay draws the same dropout masks.
    An exception in the context saves no checkpoint, because the optimizer may not have taken the
    last recorded step.
    Raises TrajectoryError for input that can't be recorded or written, and for a folder with
    another training.
    """

    def __init__(
        self, dir: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer,
        checkpoint_every: int = 100, reduction: str = "mean", *, start: int = 0,
        save_optimizer: bool = False, seed: int | None = None,
    ) -> None:  # fmt: skip
        if reduction not in ("mean", "sum"):
            raise TrajectoryError(
                f"reduction is {reduction!r}",
                "expected: mean (each entry weighs 1/|B|) or sum (each weighs 1)",
            )
        if checkpoint_every < 1 or start < 0:
            raise TrajectoryError(
                f"checkpoint_every is {checkpoint_every}, start {start}",
                "expected: from 1, and from 0",
            )
        check_rank_zero()
        self.folder, self.model, self.optimizer = Path(dir), unwrap_model(model), optimizer
        self.path = self.folder / "trajectory.jsonl"
        self.checkpoint_every, self.reduction = checkpoint_every, reduction
        self.start, self.save_optimizer = start, save_optimizer
        self.steps = start
        self._seed = None if seed is None else read_integers("seed", [seed])[0]
        self._options = read_group_options(optimizer)
        self._micro_batches: list[tuple[list[int], list[float] | None]] = []  # of the next step
        self._saved: int | None = None  # step of the newest checkpoint
        self._buffers: dict[str, Tensor] = {}  # before the forward passes of the next step
        self._log: LineLog | None = None
        self._forward: ForwardSeeds | None = None

    def __enter__(self) -> "TrajectoryRecorder":
        header = build_header(self.model, self.optimizer, self._options, self.reduction)
        if self._seed is not None:
            header["device"] = next(self.model.parameters()).device.type
        earlier = read_earlier_part(self.folder, self.start, header, self.model)
        self._saved = self.start if earlier.has_checkpoint else None
        with report_write_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoints", "optimizer"):
                remove_stale_files(self.folder / name)
            remove_stale_siblings(self.path)
            write_bytes(self.path, b"".join([encode_line(header), *earlier.lines]))
            self._log = LineLog(self.path)
        self._forward = ForwardSeeds(self.model, self._seed, self._copy_buffers)
        self._forward.begin_step(self.steps)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._log is not None and self._saved != self.steps:
                self._save()
                self._check_options()
        finally:
            self._close()

    def add(self, indices: Numbers, weights: Numbers | None = None) -> None:
        """Adds a micro-batch. `step()` without indices records those since the last step."""
        ids, values = read_entries(indices, weights)
        first_ids, first_values = self._micro_batches[0] if self._micro_batches else (ids, values)
        if (values is None) != (first_values is None):
            raise TrajectoryError(
                "micro-batches with weights and without in one step",
                "expected: weights for all of them, or none",
            )
        if values is None and self.reduction == "mean" and len(ids) != len(first_ids):
            raise TrajectoryError(
                f"micro-batches of {len(first_ids)} and {len(ids)} examples in one step, "
                "with reduction mean and no weights",
                "an entry then does not weigh 1/|B|",
                "give add() the weights: each loss's factor in the optimizer's gradient",
            )
        self._micro_batches.append((list(ids), values))
        if self._forward is not None:
            self._forward.end_micro_batch()

    def begin_micro_batch(self) -> None:
        """Seeds torch's generators for the micro-batch that comes. Without it, its one forward pass
        of the recorded model does. Does nothing without `seed`.
        """
        self._check_is_recording()
        assert self._forward is not None
        self._forward.begin_micro_batch()

    def step(
        self,
        indices: Numbers | None = None,
        weights: Numbers | None = None,
        clip: float | Tensor = 1.0,
        seed: int | None = None,
    ) -> None:
        """Records the step that `optimizer.step()` takes next, after its checkpoint if one is due.

        `indices`: (B,) example ids. `weights`: (B,) factors of their losses; None: 1/|B| or 1, by
        the reduction. `clip`: factor of the gradient.
        """
        self._check_is_recording()
        assert self._log is not None
        added = len(self._micro_batches)
        if (indices is None) != bool(added) or (indices is None and weights is not None):
            raise TrajectoryError(
                f"step() got {'no' if indices is None else 'its own'} indices, "
                f"add() before it {added or 'none'}",
                "expected: step(indices, weights); "
                "or add(indices, weights) for each micro-batch, then step()",
            )
        batches = self._micro_batches if indices is None else [read_entries(indices, weights)]
        line = self._describe_step(batches, clip, seed)
        if self.steps % self.checkpoint_every == 0 and self._saved != self.steps:
            self._check_options()
            self._save()
        try:
            self._log.append(encode_line(line))
        except OSError as error:
            self._close()
            raise describe_write_error(self.path, error) from error
        self.steps += 1
        self._micro_batches, self._buffers = [], {}
        assert self._forward is not None
        self._forward.begin_step(self.steps)

    @staticmethod
    def restore(
        dir: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> int:
        """Loads the folder's newest checkpoint, and its optimizer state if saved. Returns its step,
        to be given as `start`; 0 if there is no checkpoint.

        Learning rates stay as they are. Raises TrajectoryError, CheckpointError.
        """
        saved, model = list_checkpoints(Path(dir)), unwrap_model(model)
        if not saved:
            return 0
        newest = saved[-1]
        state = Path(dir) / "optimizer" / checkpoint_name(newest.step)
        stateless = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] for group in optimizer.param_groups
        )
        if newest.step and not stateless and not state.is_file():
            raise TrajectoryError(
                f"{newest.name} has no optimizer state beside it, "
                f"and {optimizer_name(optimizer)} can't resume without",
                f"expected: {state}",
                "TrajectoryRecorder(..., save_optimizer=True) saves it",
            )
        check_fits_model([newest], model, cast=False)
        load_checkpoint(newest, model)
        if state.is_file():
            load_state(state, model, optimizer)
        return newest.step

    def _describe_step(
        self,
        batches: list[tuple[list[int], list[float] | None]],
        clip: float | Tensor,
        seed: int | None,
    ) -> dict[str, Any]:  # Any: JSON values
        rates = self._read_rates()
        line: dict[str, Any] = {
            "step": self.steps,
            "lr": rates if len(rates) > 1 else rates[0],
            "examples": list(itertools.chain(*(ids for ids, _ in batches))),
        }
        if batches[0][1] is not None:
            line["weights"] = list(itertools.chain(*(values or () for _, values in batches)))
        if (factor := read_number("clip", clip)) != 1:
            line["clip"] = factor
        if seed is not None:
            line["seed"] = read_integers("seed", [seed])[0]
        assert self._forward is not None
        return line | self._forward.describe_step([len(ids) for ids, _ in batches])

    def _save(self) -> None:
        """Saves the checkpoint of `steps`. Syncs its lines first, then saves the optimizer state:
        a checkpoint that exists has both."""
        assert self._log is not None
        name = checkpoint_name(self.steps)
        metadata = {"step": str(self.steps), "learning_rate": repr(self._read_rates()[0])}
        state = self.folder / "optimizer" / name
        with report_write_errors(self.path):
            self._log.sync()
            state.unlink(missing_ok=True)  # of a training that was given up
        if self.save_optimizer:
            save_state(state, self.model, self.optimizer)
        path = self.folder / "checkpoints" / name
        save_checkpoint(path, self.model, metadata, self._buffers)
        self._saved = self.steps

    def _copy_buffers(self) -> None:
        """Keeps the buffers for a checkpoint that is due: a forward pass changes them."""
        if self.steps % self.checkpoint_every == 0:
            self._buffers = {
                name: value.detach().clone() for name, value in self.model.named_buffers()
            }

    def _read_rates(self) -> list[float]:
        groups = self.optimizer.param_groups
        if len(groups) != len(self._options):
            raise TrajectoryError(
                f"the optimizer has {len(groups)} parameter groups, "
                f"and had {len(self._options)} when the recording began",
                "expected: the same groups at all steps",
                "add all groups before it begins; one may have lr 0",
            )
        return [read_number("the learning rate", group["lr"]) for group in groups]

    def _check_options(self) -> None:
        before = dict(enumerate(self._options))
        now = dict(enumerate(read_group_options(self.optimizer)))
        if differences := list_differences(before, now):
            raise TrajectoryError(
                "the optimizer's options changed during training, "
                "and the header has one value for all steps",
                *(f"group {line}" for line in differences),
                "schedule lr alone (OneCycleLR, CyclicLR: cycle_momentum=False)",
            )

    def _check_is_recording(self) -> None:
        if self._log is None:
            raise TrajectoryError(
                "the recorder is not recording",
                "expected: with TrajectoryRecorder(...) as recorder: around the loop",
            )

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
        if self._forward is not None:
            self._forward.remove()
            self._forward = None


def encode_line(content: dict[str, Any]) -> bytes:  # Any: JSON values
    return seal_json(JSON.encode(content).encode())


def check_rank_zero() -> None:
    """Raises TrajectoryError on any other rank of a distributed training."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        raise TrajectoryError(
            f"rank {distributed.get_rank()} records too",
            "expected: a recorder on rank 0 alone",
            "gather the indices of all ranks on rank 0, and record them there",
        )
