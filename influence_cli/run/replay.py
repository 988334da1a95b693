"""Re-runs recorded steps with torch's own optimizers, as they were or without some examples.

A step with recorded seeds runs in train mode, with the dropout masks of training. Any other step
runs in eval mode, as everywhere in this tool: dropout is off, and BatchNorm uses the checkpoint's
statistics. If training ran in another mode, the replay may diverge from it. `relative_distance`
measures by how much.

Letters: B entries of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from influence_cli.errors import (
    GradientError,
    InfluenceError,
    TrajectoryError,
    is_out_of_memory,
    is_too_large,
)
from influence_cli.progress import Advance
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.definition import describe_failure
from influence_cli.run.optimizer_state import state_path
from influence_cli.run.optimizers import build_optimizers, describe_unknown_state, is_stateful
from influence_cli.run.replay_state import (
    Moments,
    ReplayState,
    copy_states,
    load_saved_states,
    parameters_of,
    read_momenta,
    read_moments,
    restore_states,
    total_norm,
)
from influence_cli.run.run import Run
from influence_cli.run.training_mode import run_as_trained
from influence_cli.run.trajectory import missing_trajectory

# training ids (B,) -> their batch (Any: the user's), on the model's device, in its precision
LoadBatch = Callable[[np.ndarray], Any]


@dataclass(frozen=True)
class DroppedExample:
    """One example to leave out of one step. `renormalize`: the other weights keep their sum.

    The example stays in the forward pass, so rounding is that of the complete batch.
    """

    step: int
    example: int
    renormalize: bool = False
    keeps_rows = True

    def rest(self, step: int, examples: np.ndarray, weights_B: np.ndarray) -> np.ndarray:
        """The weights of a step: 0 for the example in its step."""
        if step != self.step:
            return weights_B
        rest_B = np.where(examples == self.example, 0.0, weights_B)
        return rescale(rest_B, weights_B) if self.renormalize else rest_B


@dataclass(frozen=True)
class OmittedExamples:
    """Examples to leave out of every step. `ids`: theirs.

    `renormalize`: the other weights of a step keep their sum.
    """

    ids: np.ndarray
    renormalize: bool = False
    keeps_rows = False

    def rest(self, step: int, examples: np.ndarray, weights_B: np.ndarray) -> np.ndarray:
        """The weights of a step: 0 for these examples."""
        rest_B = np.where(np.isin(examples, self.ids), 0.0, weights_B)
        return rescale(rest_B, weights_B) if self.renormalize else rest_B


def rescale(rest: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The remaining weights of a step, with the sum of all.

    A step of omitted examples alone has nothing to rescale: its gradient is 0.
    """
    return rest * (weights.sum() / rest.sum()) if rest.sum() else rest


def explain_failed_step(step: int, rates: Sequence[float], error: RuntimeError) -> Exception:
    """A GradientError if a number of the step is too large for the model's precision."""
    if not is_too_large(error):
        return error
    return GradientError(
        f"the optimizer can't make step {step}: {error}",
        f"the learning rate is {', '.join(f'{rate:g}' for rate in rates)}",
        "check lr, weights and clip in the trajectory; --precision float64 holds larger numbers",
    )


class Replay:
    """A training of the run's model from a checkpoint on, after `step` steps.

    It does not train parameters that are in none of the trajectory's groups. `clipped`: step ->
    norm of its gradient after clipping. `batch_size`: entries of one forward pass; the gradients
    of a larger step are summed. Call `start_from` first.

    Raises TrajectoryError: no trajectory; an unknown optimizer, or unknown options.
    """

    def __init__(self, run: Run, load_batch: LoadBatch, batch_size: int | None = None) -> None:
        if run.trajectory is None:
            raise missing_trajectory("replay")
        self.trajectory = run.trajectory
        self._folder, self._definition, self._model = run.folder, run.definition, run.model
        self._load_batch, self._batch_size = load_batch, batch_size
        self._optimizers = build_optimizers(run.model.module, run.columns, self.trajectory)
        names = {id(parameter): name for name, parameter in run.model.module.named_parameters()}
        self._owners = {
            names[id(parameter)]: (optimizer, parameter)
            for optimizer in self._optimizers.values()
            for parameter in parameters_of(optimizer)
        }
        self._parameters = [parameter for _, parameter in self._owners.values()]
        self._buffers = list(run.model.module.buffers()) if self._trains() else []
        self.names = list(self._owners)
        self.clipped = dict[int, float]()

    def _trains(self) -> bool:
        """Whether a step runs in train mode. Raises TrajectoryError for another kind of device."""
        if not any(line.training for line in self.trajectory.lines):
            return False
        device = next(self._model.module.parameters()).device.type
        if self.trajectory.device not in (None, device):
            raise TrajectoryError(
                f"{self.trajectory.path.name}: {self.trajectory.device} drew the random masks of "
                f"training, and {device} draws others",
                f"expected: --device {self.trajectory.device}",
            )
        return True

    # ------------------------------------------------------------ where the replay is
    def can_start_from(self, checkpoint: Checkpoint) -> bool:
        """Whether the optimizer's state at a checkpoint is known: it has none, or was saved."""
        return (
            not checkpoint.step
            or not is_stateful(self.trajectory)
            or state_path(self._folder, checkpoint.step).is_file()
        )

    def start_from(self, start: Checkpoint) -> None:
        """Load a checkpoint and the optimizer state that was saved with it.

        Raises TrajectoryError where that state is unknown or damaged.
        """
        if not self.can_start_from(start):
            raise describe_unknown_state(self.trajectory, start)
        for optimizer in self._optimizers.values():
            optimizer.state.clear()
            optimizer.zero_grad(set_to_none=True)
        if start.step and is_stateful(self.trajectory):
            path = state_path(self._folder, start.step)
            load_saved_states(path, self.trajectory.optimizer or "", self._owners)
        self.continue_from(start)

    def continue_from(self, checkpoint: Checkpoint) -> None:
        """Load a checkpoint into the model, and keep the optimizer's state."""
        self._model.at(checkpoint)
        self._start = checkpoint
        self.step = checkpoint.step

    def save_state(self) -> ReplayState:
        """A copy of parameters and optimizer state."""
        states = tuple(copy_states(optimizer) for optimizer in self._optimizers.values())
        return ReplayState(self.step, self._start, self._copy_values(), states)

    def restore(self, state: ReplayState) -> None:
        """Return to where `state` was saved."""
        self._model.restore(state.base, self._values, state.values)
        for optimizer, states in zip(self._optimizers.values(), state.optimizers, strict=True):
            restore_states(optimizer, states)
        self._start, self.step = state.base, state.step

    def moments(self) -> dict[str, Moments]:
        """Copies of Adam's state of each parameter."""
        return {name: read_moments(*owner) for name, owner in self._owners.items()}

    def momenta(self) -> dict[str, Tensor]:
        """Copies of the momentum of each parameter that has one."""
        return read_momenta(self._owners)

    def relative_distance(self, checkpoint: Checkpoint) -> float:
        """The distance from the replay's parameters to a saved checkpoint's, relative to the
        distance from the checkpoint where the replay started to the saved one. The replay keeps its
        place.
        """
        replayed = self._copy_values()
        saved, start = self._parameters_at(checkpoint), self._parameters_at(self._start)
        self._model.restore(self._start, self._values, replayed)
        trained = total_norm(a - b for a, b in zip(saved, start, strict=True))
        pairs = zip(saved, replayed[: len(saved)], strict=True)
        error = total_norm(a - b for a, b in pairs)
        return error / trained if trained else error

    def _parameters_at(self, checkpoint: Checkpoint) -> tuple[Tensor, ...]:
        self._model.at(checkpoint)
        return self._copy_values()[: len(self._parameters)]

    @property
    def _values(self) -> list[Tensor]:
        """What a step changes: parameters, then buffers if it runs in train mode."""
        return [*self._parameters, *self._buffers]

    def _copy_values(self) -> tuple[Tensor, ...]:
        return tuple(value.detach().clone() for value in self._values)

    # ------------------------------------------------------------ steps
    def advance(
        self,
        stop: int,
        drop: DroppedExample | OmittedExamples | None = None,
        max_norm: float | None = None,
        reverse: bool = False,
        report_progress: Advance | None = None,
    ) -> None:
        """Run the steps up to `stop`, exclusive. It calls `report_progress(1)` after each.

        `max_norm`: clip gradients at this norm, not by the recorded factors. `reverse`: the batches
        in reverse order, which changes only rounding.
        """
        for step in range(self.step, stop):
            line, weights_B = self.trajectory.lines[step], self.trajectory.weights(step)
            examples = line.examples
            if drop is not None:
                weights_B = drop.rest(step, examples, weights_B)
                if not (drop.keeps_rows or line.training):  # masks belong to a row of the batch
                    examples, weights_B = examples[weights_B != 0], weights_B[weights_B != 0]
            self._compute_gradient(step, examples, weights_B, reverse)
            self._clip(step, line.clip, max_norm)
            rates = self.trajectory.rates(step)
            for number, optimizer in self._optimizers.items():
                optimizer.param_groups[0]["lr"] = rates[number]
            try:
                self._model.step(self._optimizers.values())
            except RuntimeError as error:
                raise explain_failed_step(step, rates, error) from error
            self.step = step + 1
            if report_progress is not None:
                report_progress(1)

    def gradient(self, step: int) -> list[Tensor]:
        """The gradient of a step's loss at the model's parameters, in the order of `names`.

        It is zeros for a parameter that the loss does not depend on.
        """
        line = self.trajectory.lines[step]
        self._compute_gradient(step, line.examples, self.trajectory.weights(step))
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        return grads

    def _compute_gradient(
        self, step: int, examples: np.ndarray, weights_B: np.ndarray, reverse: bool = False
    ) -> None:
        """Add the gradient of the sum of weight x loss to `grad`. `reverse`: in another order, so
        that rounding differs.
        """
        if not len(examples):
            for parameter in self._parameters:
                parameter.grad = torch.zeros_like(parameter)
        mode = self.trajectory.lines[step].training
        if mode is not None:
            for part, seed in mode.micro_batches():
                with run_as_trained(self._model.module, seed, mode.eval_modules):
                    self._add_part(step, examples[part], weights_B[part], in_halves=reverse)
            return
        if reverse:
            examples, weights_B = examples[::-1].copy(), weights_B[::-1].copy()
        size = self._batch_size or max(1, len(examples))
        for first in range(0, len(examples), size):
            part = slice(first, first + size)
            self._add_part(step, examples[part], weights_B[part])

    def _add_part(
        self, step: int, examples: np.ndarray, weights_B: np.ndarray, in_halves: bool = False
    ) -> None:
        """Add the gradient of one forward pass. `in_halves`: by a backward pass for each half."""
        batch = self._load_batch(examples)
        try:
            self._backward(batch, weights_B, in_halves)
        except InfluenceError:
            raise
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise self._explain_memory(step, len(examples)) from error
            raise describe_failure(self._definition, "loss", error) from error

    def _explain_memory(self, step: int, count: int) -> GradientError:
        remedy = "--batch-size N computes fewer examples at once"
        if self.trajectory.lines[step].training is not None:
            remedy = "recorded dropout masks need the complete micro-batch, as in training"
        return GradientError(f"out of memory in a batch of {count} at step {step}", remedy)

    def _backward(
        self,
        batch: Any,  # the user's
        weights_B: np.ndarray,
        in_halves: bool,
    ) -> None:
        losses_B = self._definition.raw("loss")(self._model.module, batch)
        count = len(weights_B)
        if not isinstance(losses_B, Tensor) or losses_B.shape != (count,):
            is_tensor = isinstance(losses_B, Tensor)
            raise GradientError(
                f"loss() returned {tuple(losses_B.shape) if is_tensor else type(losses_B).__name__}"
                f" for {count} examples",
                f"expected: ({count},), one per example",
            )
        weights = torch.as_tensor(weights_B, dtype=losses_B.dtype, device=losses_B.device)
        if in_halves:
            half = count // 2
            (losses_B[:half] @ weights[:half]).backward(inputs=self._parameters, retain_graph=True)
            losses_B, weights = losses_B[half:], weights[half:]
        (losses_B @ weights).backward(inputs=self._parameters)

    def _clip(self, step: int, recorded: float, max_norm: float | None) -> None:
        if recorded == 1 and max_norm is None:
            return
        grads = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        norm = total_norm(grads) if grads else 0.0
        factor = recorded
        if max_norm is not None and 0 < recorded <= 1:  # 0: a step that was skipped
            factor = min(1.0, max_norm / norm) if norm else 1.0
        if 0 < factor < 1:
            self.clipped[step] = factor * norm
        for grad in grads:
            grad.mul_(factor)
