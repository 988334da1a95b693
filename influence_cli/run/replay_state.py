"""The state of a replay: copies of it, Adam's moment estimates, and the state that was saved.

Letters: D numbers of a parameter.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from influence_cli.errors import TrajectoryError, listed
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizer_state import read_state

ParameterState = dict[str, Any]  # Any: torch's optimizers keep tensors and numbers


@dataclass(frozen=True)
class ReplayState:
    """A copy of a replay after `step` steps: optimizer state, and `values` of the trained
    parameters. If forward passes ran in train mode, which changes buffers, `values` has these, too.

    All other weights are those of `base`, the last checkpoint that the replay loaded.
    """

    step: int
    base: Checkpoint
    values: tuple[Tensor, ...]
    optimizers: tuple[tuple[ParameterState, ...], ...]


@dataclass(frozen=True)
class Moments:
    """Adam's state of one parameter before a step: the number of steps, m, v and θ, each (D,)."""

    count: int
    m: Tensor
    v: Tensor
    theta: Tensor


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of an optimizer with one group."""
    return optimizer.param_groups[0]["params"]


def copy_state(state: Mapping[str, Any]) -> ParameterState:
    """A copy of the optimizer state of one parameter."""
    return {
        name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()
    }


def copy_states(optimizer: Optimizer) -> tuple[ParameterState, ...]:
    """Copies of the state of each parameter; {} where it has none yet."""
    return tuple(
        copy_state(optimizer.state.get(parameter, {})) for parameter in parameters_of(optimizer)
    )


def restore_states(optimizer: Optimizer, states: Sequence[ParameterState]) -> None:
    """Give an optimizer copies of these states, one for each parameter."""
    optimizer.state.clear()
    for parameter, state in zip(parameters_of(optimizer), states, strict=True):
        if state:
            optimizer.state[parameter] = copy_state(state)


def read_moments(optimizer: Optimizer, parameter: nn.Parameter) -> Moments:
    """Copies of Adam's state of a parameter; zeros before its first step."""
    state = optimizer.state.get(parameter, {})
    m, v = (
        state[key].flatten().clone() if state else parameter.new_zeros(parameter.numel())
        for key in ("exp_avg", "exp_avg_sq")
    )
    theta = parameter.detach().flatten().clone()
    return Moments(int(state["step"]) if state else 0, m, v, theta)


def read_momenta(owners: Mapping[str, tuple[Optimizer, nn.Parameter]]) -> dict[str, Tensor]:
    """(D,) copies of SGD's momentum buffer or Adam's m of each parameter that has one."""
    states = {name: optimizer.state.get(value, {}) for name, (optimizer, value) in owners.items()}
    momenta = {
        name: state.get("exp_avg", state.get("momentum_buffer")) for name, state in states.items()
    }
    return {name: value.flatten().clone() for name, value in momenta.items() if value is not None}


def load_saved_states(
    path: Path, optimizer_name: str, owners: Mapping[str, tuple[Optimizer, nn.Parameter]]
) -> None:
    """Load the optimizer state of a file. `owners`: per parameter name its optimizer and tensor.

    Raises TrajectoryError: a state of another model or optimizer, or with impossible values.
    """
    saved = read_state(path, optimizer_name)
    if unknown := saved.keys() - owners.keys():
        raise TrajectoryError(
            f"{path} is of another model: it has the state of {listed(sorted(unknown))}",
            "expected: parameters that the trajectory's groups train",
        )
    for name, state in saved.items():
        for key, value in state.items():
            check_saved_value(path, name, key, value)
    for name, (optimizer, parameter) in owners.items():
        if name in saved:
            fused = bool(optimizer.param_groups[0].get("fused"))
            optimizer.state[parameter] = {
                key: match_parameter(key, value, parameter, fused)
                for key, value in saved[name].items()
            }


def check_saved_value(
    path: Path,
    name: str,
    key: str,
    value: Any,  # as in ParameterState
) -> None:
    """Raise TrajectoryError for a tensor that no optimizer computes."""
    if not isinstance(value, Tensor):
        return
    is_possible = torch.isfinite(value).all() and (key != "exp_avg_sq" or (value >= 0).all())
    if not is_possible:
        raise TrajectoryError(
            f"optimizer/{path.name}: {key} of {name} is not finite, or a square below 0",
            "the file is damaged, or training had diverged",
        )


def match_parameter(
    key: str,
    value: Any,  # as in ParameterState
    parameter: Tensor,
    fused: bool,
) -> Any:
    """A saved value on the device and in the dtype of its parameter. The step count keeps its form,
    except for a fused kernel, which takes it as float32 on the device.
    """
    if key == "step":
        return torch.as_tensor(value).to(parameter.device, torch.float32) if fused else value
    return value.to(parameter.device, parameter.dtype) if isinstance(value, Tensor) else value


def total_norm(tensors: Iterable[Tensor]) -> float:
    """The norm of all numbers: of each tensor in float32 or wider, of their norms in float64."""
    wide = (
        tensor.detach() if tensor.dtype.itemsize >= 4 else tensor.detach().float()
        for tensor in tensors
    )
    return float(torch.stack([tensor.norm().cpu().double() for tensor in wide]).norm())
