"""Records a training as it goes: a line per optimizer step in trajectory.jsonl, and checkpoints that it can go on from."""

import itertools
import json
import math
import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.errors import TrajectoryError, listed
from influence_cli.run.checkpoint_loading import check_fits_model, list_tensors, load_checkpoint
from influence_cli.run.optimizer_state import (
    checkpoint_name,
    list_checkpoints,
    load_state,
    map_parameter_names,
    matches_parameters,
    optimizer_name,
    report_write_errors,
    save_state,
    write_state_file,
)
from influence_cli.run.trajectory_reader import FORMAT, read_trajectory
from influence_cli.storage.atomic import LineLog, remove_stale_files, write_bytes

Numbers = Sequence[Any] | np.ndarray | Tensor
LEFT_OUT = (
    "lr",
    "foreach",
    "fused",
    "capturable",
    "differentiable",
)  # lr has its place in each line; how it is computed matters to nobody
JSON = json.JSONEncoder(separators=(",", ":"), default=lambda tensor: tensor.item())
RESUME = "to go on: start = TrajectoryRecorder.restore(dir, model, optimizer), then TrajectoryRecorder(..., start=start)"


class TrajectoryRecorder:
    """A block around a training loop: `step()` before each `optimizer.step()`; leaving the block saves the last checkpoint.

    `start`: steps that model and optimizer have taken already (a resume). `steps`: that many and those recorded since.
    Left by an exception, the block saves nothing: nobody knows then whether the optimizer took the last recorded step.
    Raises TrajectoryError for what can't be recorded or written, and for a folder with another training in it.
    """

    def __init__(
        self, dir: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint_every: int = 100,
        reduction: str = "mean", *, start: int = 0, save_optimizer: bool = False,
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
        if (
            torch.distributed.is_available()
            and torch.distributed.is_initialized()
            and (rank := torch.distributed.get_rank())
        ):
            raise TrajectoryError(
                f"rank {rank} records too",
                "gather the indices of all ranks, and record on rank 0 alone",
            )
        self.folder, self.model, self.optimizer = Path(dir), _unwrapped(model), optimizer
        self.path = self.folder / "trajectory.jsonl"
        self.checkpoint_every, self.reduction, self.start, self.save_optimizer = (
            checkpoint_every,
            reduction,
            start,
            save_optimizer,
        )
        self.steps = start
        self._options = _options(optimizer)
        self._pending: list[
            tuple[list[int], list[float] | None]
        ] = []  # micro-batches of the step to come
        self._saved: int | None = None  # step of the newest checkpoint
        self._log: LineLog | None = None

    def __enter__(self) -> "TrajectoryRecorder":
        header = self._header()
        lines = [JSON.encode(header).encode() + b"\n", *self._kept(header)]
        with report_write_errors(self.path):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoints", "optimizer"):
                remove_stale_files(self.folder / name)
            write_bytes(self.path, b"".join(lines))
            self._log = LineLog(self.path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None and self._log is not None and self._saved != self.steps:
                self._save()
                self._same_options()
        finally:
            self._close()

    def add(self, indices: Numbers, weights: Numbers | None = None) -> None:
        """The entries of one micro-batch; `step()` without indices records all since the last step as one."""
        ids, values = _entries(indices, weights)
        first_ids, first_values = self._pending[0] if self._pending else (ids, values)
        if (values is None) != (first_values is None):
            raise TrajectoryError(
                "micro-batches with weights and without in one step",
                "expected: weights for all of them, or none",
            )
        if values is None and self.reduction == "mean" and len(ids) != len(first_ids):
            raise TrajectoryError(
                f"micro-batches of {len(first_ids)} and {len(ids)} examples in one step, with reduction mean and no weights",
                "1/|B| is then not what each entry weighed",
                "give add() the weights: what each entry's loss was multiplied by in the gradient that the optimizer gets",
            )
        self._pending.append((list(ids), values))

    def step(
        self,
        indices: Numbers | None = None,
        weights: Numbers | None = None,
        clip: float | Tensor = 1.0,
        seed: int | None = None,
    ) -> None:
        """Record the step that `optimizer.step()` is about to take, after its checkpoint where one is due.

        `indices`: (B,) example ids; `weights`: (B,) factors of their losses, None: 1/|B| or 1; `clip`: factor of the gradient.
        """
        if self._log is None:
            raise TrajectoryError(
                "the recorder is not recording",
                "expected: with TrajectoryRecorder(...) as recorder: around the loop",
            )
        if (indices is None) != bool(self._pending) or (indices is None and weights is not None):
            raise TrajectoryError(
                f"step() got {'no' if indices is None else 'its own'} indices, add() before it {len(self._pending) or 'none'}",
                "expected: step(indices, weights); or add(indices, weights) for each micro-batch, then step()",
            )
        parts = self._pending if indices is None else [_entries(indices, weights)]
        rates = self._rates()
        line = {
            "step": self.steps,
            "lr": rates if len(rates) > 1 else rates[0],
            "examples": list(itertools.chain(*(ids for ids, _ in parts))),
        }
        if parts[0][1] is not None:
            line["weights"] = list(itertools.chain(*(values or () for _, values in parts)))
        if (factor := _number("clip", clip)) != 1:
            line["clip"] = factor
        if seed is not None:
            line["seed"] = _whole("seed", [seed])[0]
        if self.steps % self.checkpoint_every == 0 and self._saved != self.steps:
            self._same_options()
            self._save()
        try:
            with report_write_errors(self.path):
                self._log.append(JSON.encode(line).encode() + b"\n")
        except TrajectoryError:
            self._close()
            raise
        self.steps += 1
        self._pending = []

    @staticmethod
    def restore(
        dir: str | os.PathLike[str], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> int:
        """Load the folder's newest checkpoint, and the optimizer's state where one is beside it; its step, to be given as `start`.

        0 where there is no checkpoint: a training that begins. Learning rates stay as they are. Raises TrajectoryError, CheckpointError.
        """
        saved, model = list_checkpoints(Path(dir)), _unwrapped(model)
        if not saved:
            return 0
        newest = saved[-1]
        state = Path(dir) / "optimizer" / checkpoint_name(newest.step)
        stateless = isinstance(optimizer, torch.optim.SGD) and not any(
            group["momentum"] for group in optimizer.param_groups
        )
        if newest.step and not stateless and not state.is_file():
            raise TrajectoryError(
                f"{newest.name} has no optimizer state beside it, and {optimizer_name(optimizer)} can't go on without",
                f"expected: {state}",
                "TrajectoryRecorder(..., save_optimizer=True) saves it",
            )
        check_fits_model([newest], model, cast=False)
        load_checkpoint(newest, model)
        if state.is_file():
            load_state(state, model, optimizer)
        return newest.step

    def _save(self) -> None:
        """The checkpoint of `steps`. Its lines come to the disk first, then optimizer state: a checkpoint that is there has both."""
        assert self._log is not None
        name, about = (
            checkpoint_name(self.steps),
            {"step": str(self.steps), "learning_rate": repr(self._rates()[0])},
        )
        state = self.folder / "optimizer" / name
        with report_write_errors(self.path):
            self._log.sync()
            state.unlink(missing_ok=True)  # that of a training that was given up
        if self.save_optimizer:
            save_state(state, self.model, self.optimizer)
        once = {
            id(value): (key, value) for key, value in reversed(list_tensors(self.model).items())
        }  # a tied tensor's first name
        write_state_file(self.folder / "checkpoints" / name, dict(once.values()), about)
        self._saved = self.steps

    def _rates(self) -> list[float]:
        groups = self.optimizer.param_groups
        if len(groups) != len(self._options):
            raise TrajectoryError(
                f"the optimizer has {len(groups)} parameter groups, and had {len(self._options)} when the recording began",
                "add all groups before it begins; one may have lr 0",
            )
        return [_number("the learning rate", group["lr"]) for group in groups]

    def _same_options(self) -> None:
        if differences := _differences(
            dict(enumerate(self._options)), dict(enumerate(_options(self.optimizer)))
        ):
            raise TrajectoryError(
                "the optimizer's options changed in training, and the header says one value for all steps",
                *(f"group {line}" for line in differences),
                "schedule lr alone (OneCycleLR, CyclicLR: cycle_momentum=False)",
            )

    def _header(self) -> dict[str, Any]:
        """Groups are named where there are several, or where one leaves out trained parameters."""
        names, groups, first = (
            map_parameter_names(self.model),
            self.optimizer.param_groups,
            self._options[0],
        )
        held = [
            [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
            for group in groups
        ]
        foreign = sum(len(group["params"]) for group in groups) - sum(map(len, held))
        if foreign:
            raise TrajectoryError(
                f"the optimizer holds {foreign} parameters that are not the model's",
                "give the module that holds all",
            )
        header = {"format": FORMAT, "version": 1, "reduction": self.reduction}
        header["optimizer"] = {"name": optimizer_name(self.optimizer)} | first
        if len(groups) > 1 or {
            name for name, own in self.model.named_parameters() if own.requires_grad
        } - set(held[0]):
            header["groups"] = [
                {"params": members}
                | {key: value for key, value in options.items() if value != first.get(key)}
                for members, options in zip(held, self._options, strict=True)
            ]
        return header

    def _kept(self, header: dict[str, Any]) -> list[bytes]:
        """The lines before `start`. Raises TrajectoryError where what is in the folder is not the beginning of this training."""
        lines = self.path.read_bytes().splitlines() if self.path.is_file() else []
        saved = list_checkpoints(self.folder)
        here = next((checkpoint for checkpoint in saved if checkpoint.step == self.start), None)
        later = [checkpoint.name for checkpoint in saved if checkpoint.step > self.start]
        same = here is not None and matches_parameters(here, self.model)
        if not self.start and lines[1:] and (later or not same):
            raise TrajectoryError(
                f"{self.path} records a training already, {len(lines) - 1:,} steps of it",
                f"checkpoints: {listed([checkpoint.name for checkpoint in saved]) or 'none'}",
                RESUME,
                "to begin anew: another folder, or delete trajectory.jsonl, checkpoints/ and optimizer/",
            )
        if later:
            what = f"{self.folder} holds checkpoints after step {self.start}, of a training that is given up: {listed(later)}"
            raise TrajectoryError(what, "delete them", RESUME)
        if not self.start:  # what is there came from these very parameters, and to no checkpoint
            return []
        recorded = read_trajectory(self.path, None).steps if lines else 0
        if recorded < self.start:
            raise TrajectoryError(
                f"{self.path} lacks the steps {recorded} to {self.start - 1}, and start is {self.start}",
                "every step needs its line; start is the number of steps that model and optimizer have taken",
            )
        if differences := _differences(json.loads(lines[0]), header):
            raise TrajectoryError(
                f"{self.path} has another header than this training",
                *differences,
                "go on with the same, or begin anew",
            )
        if here and not same:
            raise TrajectoryError(
                f"start is {self.start}, and the model is not that of {here.name}", RESUME
            )
        self._saved = self.start if here else None
        return [line + b"\n" for line in lines[1:] if _step_of(line) < self.start]

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


# ---------------------------------------------------------------- what was given
def _entries(indices: Numbers, weights: Numbers | None) -> tuple[list[int], list[float] | None]:
    ids = _whole("indices", indices)
    if ids and min(ids) < 0:
        raise TrajectoryError(
            f"indices: {min(ids)} is no example id", "expected: indices of train_data(), from 0"
        )
    if weights is None:
        return ids, None
    try:
        values = list(map(float, _as_list(weights)))
        if len(values) == len(ids) and math.isfinite(sum(values)) and min(values, default=0) >= 0:
            return ids, values
    except (TypeError, ValueError):
        pass
    raise TrajectoryError(
        "weights do not fit indices",
        f"expected: {len(ids)} finite numbers from 0, one per entry",
        f"found: {weights!r:.80}",
    )


def _as_list(values: Numbers) -> list[Any]:
    found = (
        values.tolist()
        if isinstance(values, Tensor | np.ndarray)
        else values
        if isinstance(values, list)
        else list(values)
    )
    if not isinstance(found, list):
        raise TypeError("one number, not a list")
    return found


def _whole(what: str, values: Numbers) -> list[int]:
    try:
        found = _as_list(values)
        if {int}.issuperset(map(type, found)):
            return found
        if not any("bool" in str(getattr(value, "dtype", type(value))) for value in found):
            return list(map(operator.index, found))
    except TypeError:
        pass
    raise TrajectoryError(
        f"{what}: not whole numbers",
        "expected: a list, array or tensor of one axis",
        f"found: {values!r:.80}",
    )


def _number(what: str, value: Any) -> float:
    try:
        if 0 <= (number := float(value)) < math.inf:
            return number
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TrajectoryError(f"{what} is {value!r:.80}", "expected: a finite number from 0")


# ---------------------------------------------------------------- model and optimizer
def _unwrapped(model: Any) -> nn.Module:
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or hasattr(
        model, "_orig_mod"
    ):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def _options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Torch's arguments in each group, as JSON gives them back; what JSON can't hold is left out."""
    found: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        found.append({})
        for key in (key for key in optimizer.defaults if key not in LEFT_OUT and key in group):
            try:
                found[-1][key] = json.loads(JSON.encode(group[key]))
            except (TypeError, ValueError, AttributeError, RuntimeError):
                continue
    return found


def _differences(found: Mapping[Any, Any], wanted: Mapping[Any, Any], place: str = "") -> list[str]:
    """`optimizer.momentum: 0.9 before, 0.95 now`."""
    lines = []
    for key in dict.fromkeys((*found, *wanted)):
        old, new = found.get(key, "nothing"), wanted.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            lines += _differences(old, new, f"{place}{key}.")
        elif old != new:
            lines.append(f"{place}{key}: {old} before, {new} now")
    return lines


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf  # cut off
