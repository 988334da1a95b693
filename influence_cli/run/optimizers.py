"""Torch's own optimizers, as a trajectory's header names them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from influence_cli.errors import TrajectoryError
from influence_cli.run import Checkpoint, Column
from influence_cli.run.trajectory import Trajectory

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
SPEED = ("lr", "initial_lr", "foreach", "fused", "capturable", "differentiable")  # lr is each line's; the others change no number


def optimizer_of(trajectory: Trajectory) -> type[Optimizer]:
    if trajectory.optimizer not in OPTIMIZERS:
        what = f"steps of {trajectory.optimizer} can't be run again" if trajectory.optimizer else "the header names no optimizer"
        raise TrajectoryError(f"{trajectory.path.name}: {what}", f"expected: {', '.join(OPTIMIZERS)}, with torch's argument names")
    return OPTIMIZERS[trajectory.optimizer]


def is_stateful(trajectory: Trajectory) -> bool:
    """Whether a step depends on those before it by more than the parameters."""
    return trajectory.optimizer != "sgd" or any(group.options.get("momentum") for group in trajectory.groups)


def unknown_state(trajectory: Trajectory, start: Checkpoint) -> TrajectoryError:
    name = "sgd with momentum" if trajectory.optimizer == "sgd" else trajectory.optimizer
    return TrajectoryError(
        f"a replay can't start at {start.name}: {name} had a state there, which was not saved",
        "expected: a checkpoint of step 0, where the state is fresh; or RUN/optimizer/, from TrajectoryRecorder(save_optimizer=True)",
        "plain sgd can start anywhere",
    )


def options_of(trajectory: Trajectory, number: int) -> dict[str, Any]:
    """A group's options, torch's defaults where the header says nothing."""
    return build(optimizer_of(trajectory), [nn.Parameter(torch.zeros(1))], trajectory, number).param_groups[0]


def optimizers_of(model: nn.Module, columns: Mapping[str, Column], trajectory: Trajectory) -> dict[int, Optimizer]:
    """One for each of the trajectory's groups that has parameters: torch checks the options of a constructor, not those of a group.

    Raises TrajectoryError: an optimizer that is unknown or takes other options; groups that name no parameter.
    """
    kind = optimizer_of(trajectory)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, column in columns.items():
        number = trajectory.group_of(column.names)
        if number is not None:
            groups.setdefault(number, []).append(model.get_parameter(name))
    if not groups:
        raise TrajectoryError(f"{trajectory.path.name}: its groups name no parameter of the model", "the trajectory is of another model")
    return {number: build(kind, parameters, trajectory, number) for number, parameters in sorted(groups.items())}


def build(kind: type[Optimizer], parameters: list[nn.Parameter], trajectory: Trajectory, number: int) -> Optimizer:
    given = {name: value for name, value in trajectory.groups[number].options.items() if name not in SPEED}
    if given.get("decoupled_weight_decay") == (kind is torch.optim.AdamW):  # the name says it; not every torch takes the argument
        del given["decoupled_weight_decay"]
    options: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    try:
        return kind(parameters, lr=0.0, **options)  # type: ignore[call-arg]
    except (TypeError, ValueError, IndexError) as error:
        raise TrajectoryError(
            f"{trajectory.path.name}: torch's {kind.__name__} refuses these options: {error}", f"group {number}: {options}"
        ) from error
