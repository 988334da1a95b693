"""Recorded steps, run again with torch's own optimizers: as they were, or without an example.

The model runs in eval mode, as everywhere in this tool: dropout is off and BatchNorm keeps the
checkpoint's statistics. Where training ran otherwise the replay is a training of its own, close to
the recorded one or not; `apart` measures it.

B entries of a step.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from influence_cli.errors import (
    GradientError,
    InfluenceError,
    TrajectoryError,
    is_out_of_memory,
    listed,
)
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.optimizer_state import read_state, state_path
from influence_cli.run.optimizers import build_optimizers, describe_unknown_state, is_stateful
from influence_cli.run.run import Run
from influence_cli.run.trajectory import missing_trajectory

Batch = Callable[
    [np.ndarray], Any
]  # training ids (B,) -> their batch, on the model's device and in its precision


@dataclass(frozen=True)
class Drop:
    """Leaves one example out of one step. `renormalize`: the other weights grow so that their sum
    stays.
    """

    step: int
    example: int
    renormalize: bool = False

    def weights(self, examples: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(B,) the step's weights, 0 for the example. A step of that example alone has nothing to
        renormalise to: its gradient is 0.
        """
        left = np.where(examples == self.example, 0.0, weights)
        return left * (weights.sum() / left.sum()) if self.renormalize and left.sum() else left


@dataclass(frozen=True)
class State:
    """A copy of a replay after `step` steps: trained parameters and optimizer state. All other
    weights and buffers are those of `base`, the last checkpoint that the replay loaded.
    """

    step: int
    base: Checkpoint
    parameters: tuple[Tensor, ...]
    optimizers: tuple[tuple[dict[str, Any], ...], ...]


@dataclass(frozen=True)
class Moments:
    """Where Adam stood before a step, for one parameter: steps taken, m, v and the parameter
    itself, each (D,).
    """

    count: int
    m: Tensor
    v: Tensor
    theta: Tensor


class Replay:
    """The run's model, trained again from a checkpoint on: it holds the parameters and the
    optimizer state after `step` steps.

    Parameters in none of the trajectory's groups are not trained. `clipped`: of each step that was
    clipped, its gradient's norm afterwards.
    """

    def __init__(self, run: Run, batch: Batch, size: int | None = None) -> None:
        """`size`: entries in one forward pass; the gradients of a larger step are summed. It stands
        nowhere until `begin`.

        Raises TrajectoryError: no trajectory; an optimizer that is unknown or takes other options.
        """
        if run.trajectory is None:
            raise missing_trajectory("replay")
        self.trajectory = run.trajectory
        self._folder, self._definition, self._model, self._batch, self._size = (
            run.folder,
            run.definition,
            run.model,
            batch,
            size,
        )
        self._optimizers = build_optimizers(run.model.module, run.columns, self.trajectory)
        self._parameters = [
            parameter
            for optimizer in self._optimizers.values()
            for parameter in optimizer.param_groups[0]["params"]
        ]
        names = {id(parameter): name for name, parameter in run.model.module.named_parameters()}
        self.names = [names[id(parameter)] for parameter in self._parameters]
        self.clipped = dict[int, float]()

    # ------------------------------------------------------------ time
    def starts_at(self, checkpoint: Checkpoint) -> bool:
        """Whether the optimizer's state there is known: it has none, none yet, or it was saved."""
        return (
            not checkpoint.step
            or not is_stateful(self.trajectory)
            or state_path(self._folder, checkpoint.step).is_file()
        )

    def begin(self, start: Checkpoint) -> None:
        """Stand at a checkpoint, with the optimizer state that was saved there. Raises
        TrajectoryError where there was one, unknown now.
        """
        if not self.starts_at(start):
            raise describe_unknown_state(self.trajectory, start)
        for optimizer in self._optimizers.values():
            optimizer.state.clear()
            optimizer.zero_grad(set_to_none=True)
        if start.step and is_stateful(self.trajectory):
            path = state_path(self._folder, start.step)
            saved = read_state(path, self.trajectory.optimizer or "")
            if unknown := saved.keys() - set(self.names):
                raise TrajectoryError(
                    f"{path} is of another model: it has the state of {listed(sorted(unknown))}"
                )
            for name, state in saved.items():
                for key, value in state.items():
                    good = not isinstance(value, Tensor) or bool(
                        torch.isfinite(value).all() and (key != "exp_avg_sq" or (value >= 0).all())
                    )
                    if not good:
                        raise TrajectoryError(
                            f"optimizer/{path.name}: {key} of {name} is not finite, or a square "
                            "below 0"
                        )
            owners = (
                optimizer
                for optimizer in self._optimizers.values()
                for _ in optimizer.param_groups[0]["params"]
            )
            for optimizer, name, parameter in zip(
                owners, self.names, self._parameters, strict=True
            ):
                if name in saved:
                    optimizer.state[parameter] = {
                        key: fitting(key, value, parameter) for key, value in saved[name].items()
                    }
        self.anchor(start)

    def anchor(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint into the model, and keep the optimizer's state as it is."""
        self._model.at(checkpoint)
        self._start = checkpoint
        self.step = checkpoint.step

    def advance(
        self,
        stop: int,
        drop: Drop | None = None,
        max_norm: float | None = None,
        reverse: bool = False,
        report_progress: Advance | None = None,
    ) -> None:
        """Run the steps up to `stop`, which is where the replay then stands. `report_progress(1)`
        is called after every one.

        `max_norm`: clip by norm at it in place of the recorded factors. `reverse`: each batch
        backwards, the same step but for rounding.
        """
        for step in range(self.step, stop):
            line, weights = self.trajectory.lines[step], self.trajectory.weights(step)
            if drop is not None and drop.step == step:
                weights = drop.weights(line.examples, weights)
            order = np.arange(len(weights))[:: -1 if reverse else 1]
            self._gradient(step, line.examples[order], weights[order])
            self._clip(step, line.clip, max_norm)
            rates = self.trajectory.rates(step)
            for number, optimizer in self._optimizers.items():
                optimizer.param_groups[0]["lr"] = rates[number]
            self._model.step(self._optimizers.values())
            self.step = step + 1
            if report_progress is not None:
                report_progress(1)

    def gradient(self, step: int) -> list[Tensor]:
        """That of a step's loss with the parameters that the model has, in the order of `names`;
        zeros where it is not reached.
        """
        self._gradient(step, self.trajectory.lines[step].examples, self.trajectory.weights(step))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return grads

    def state(self) -> State:
        """A copy of where the replay stands."""
        return State(
            self.step,
            self._start,
            self._copy(),
            tuple(tuple(map(copied, states(optimizer))) for optimizer in self._optimizers.values()),
        )

    def go_to(self, state: State) -> None:
        """Stand where `state` was taken."""
        self._model.restore(state.base, self._parameters, state.parameters)
        for optimizer, saved in zip(self._optimizers.values(), state.optimizers, strict=True):
            optimizer.state.clear()
            optimizer.state.update(
                (p, copied(own))
                for p, own in zip(optimizer.param_groups[0]["params"], saved, strict=True)
                if own
            )
        self._start, self.step = state.base, state.step

    def moments(self) -> dict[str, Moments]:
        """Of each parameter where Adam stands, as copies."""
        moments = {}
        states_of = (
            state for optimizer in self._optimizers.values() for state in states(optimizer)
        )
        for name, parameter, state in zip(self.names, self._parameters, states_of, strict=True):
            m, v = (
                state[key].flatten().clone() if state else parameter.new_zeros(parameter.numel())
                for key in ("exp_avg", "exp_avg_sq")
            )
            moments[name] = Moments(
                int(state["step"]) if state else 0, m, v, parameter.detach().flatten().clone()
            )
        return moments

    def relative_distance(self, checkpoint: Checkpoint) -> float:
        """The distance from the replay's parameters to a saved checkpoint's, relative to the
        distance from the checkpoint where the replay started to the saved one. The replay keeps its
        place.
        """
        replayed = self._copy()
        saved, start = self._parameters_at(checkpoint), self._parameters_at(self._start)
        self._model.restore(self._start, self._parameters, replayed)
        trained = norm_of(a - b for a, b in zip(saved, start, strict=True))
        error = norm_of(a - b for a, b in zip(saved, replayed, strict=True))
        return error / trained if trained else error

    def _parameters_at(self, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
        self._model.at(checkpoint)
        return self._copy()

    def _copy(self) -> tuple[Tensor, ...]:
        return tuple(parameter.detach().clone() for parameter in self._parameters)

    # ------------------------------------------------------------ one step
    def _gradient(self, step: int, examples: np.ndarray, weights: np.ndarray) -> None:
        """Leaves in `grad` that of the sum over the entries of weight x loss. An example left out
        has weight 0.
        """
        if not len(examples):
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        size = self._size or max(1, len(examples))
        for first in range(0, len(examples), size):
            ids = examples[first : first + size]
            batch = self._batch(ids)
            try:
                losses = self._definition.raw("loss")(self._model.module, batch)
                if not isinstance(losses, Tensor) or losses.shape != (len(ids),):
                    gradient = (
                        tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                    )
                    raise GradientError(
                        f"loss() returned {gradient} for {len(ids)} examples",
                        f"expected: ({len(ids)},), one per example",
                    )
                total = losses @ torch.as_tensor(
                    weights[first : first + size], dtype=losses.dtype, device=losses.device
                )
                total.backward(inputs=self._parameters)
            except InfluenceError:
                raise
            except (Exception, SystemExit) as error:
                if is_out_of_memory(error):
                    raise GradientError(
                        f"out of memory in a batch of {len(ids)} at step {step}",
                        "--batch-size N takes fewer",
                    ) from error
                raise describe_failure(self._definition, "loss", error) from error

    def _clip(self, step: int, recorded: float, max_norm: float | None) -> None:
        if recorded == 1 and max_norm is None:
            return
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = norm_of(grads) if grads else 0.0
        factor = recorded
        if max_norm is not None and 0 < recorded <= 1:  # 0: a step that was skipped
            factor = min(1.0, max_norm / norm) if norm else 1.0
        if 0 < factor < 1:
            self.clipped[step] = factor * norm
        for grad in grads:
            grad.mul_(factor)


def fitting(key: str, value: Any, parameter: Tensor) -> Any:
    """A saved state as torch's optimizers hold it: like its parameter, but for the count of
    steps.
    """
    return (
        value.to(parameter.device, parameter.dtype)
        if isinstance(value, Tensor) and key != "step"
        else value
    )


def states(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [optimizer.state.get(parameter, {}) for parameter in optimizer.param_groups[0]["params"]]


def copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


def norm_of(tensors: Iterable[Tensor]) -> float:
    """Of all their numbers; summed in float32 or the tensors' own wider precision, then in
    float64.
    """
    wide = (
        tensor.detach() if tensor.dtype.itemsize >= 4 else tensor.detach().float()
        for tensor in tensors
    )
    return float(torch.stack([tensor.norm().cpu().double() for tensor in wide]).norm())
