"""Torch's optimizers, by their name in a trajectory's header."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from influence_cli.errors import TrajectoryError
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.parameters import Column
from influence_cli.run.trajectory import Trajectory

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}
# lr is in each line; the others change no number
NOT_OPTIONS = ("lr", "initial_lr", "capturable", "differentiable")


def find_optimizer(trajectory: Trajectory) -> type[Optimizer]:
    if trajectory.optimizer not in OPTIMIZERS:
        what = (
            f"steps of {trajectory.optimizer} can't be run again"
            if trajectory.optimizer
            else "the header names no optimizer"
        )
        raise TrajectoryError(
            f"{trajectory.path.name}: {what}",
            f"expected: {', '.join(OPTIMIZERS)}, with torch's argument names",
        )
    return OPTIMIZERS[trajectory.optimizer]


def is_stateful(trajectory: Trajectory) -> bool:
    """Whether a step depends on those before it by more than the parameters."""
    return trajectory.optimizer != "sgd" or any(
        group.options.get("momentum") for group in trajectory.groups
    )


def describe_unknown_state(trajectory: Trajectory, start: Checkpoint) -> TrajectoryError:
    name = "sgd with momentum" if trajectory.optimizer == "sgd" else trajectory.optimizer
    return TrajectoryError(
        f"a replay can't start at {start.name}: {name} had a state there, which was not saved",
        "expected: a checkpoint of step 0, where the state is fresh; "
        "or RUN/optimizer/, from TrajectoryRecorder(save_optimizer=True)",
        "plain sgd can start anywhere",
    )


def read_options(trajectory: Trajectory, number: int) -> dict[str, Any]:
    """A group's options, with torch's defaults where the header says nothing.

    The defaults come from the constructor's signature: building an optimizer would import torch's
    compiler, which takes 1.3 seconds.
    Raises TrajectoryError: options that the optimizer does not take, or values out of range.
    """
    kind = find_optimizer(trajectory)
    given = list_constructor_options(kind, trajectory, number)
    try:
        bound = signature(kind).bind([], lr=0.0, **given)
        bound.apply_defaults()
        options = dict(bound.arguments)
        check_values(options)
    except (TypeError, ValueError) as error:
        raise describe_refused_options(kind, trajectory, number, error) from error
    return options


def check_values(options: Mapping[str, Any]) -> None:
    """The ranges that torch's own constructors check. Raises ValueError or TypeError."""
    for name in ("momentum", "dampening", "weight_decay", "eps"):
        if name in options and not options[name] >= 0:
            raise ValueError(f"{name} is {options[name]!r}, expected a number from 0")
    if "betas" in options:
        betas = options["betas"]
        if (
            not isinstance(betas, tuple)
            or len(betas) != 2
            or not all(0 <= beta < 1 for beta in betas)
        ):
            raise ValueError(f"betas is {betas!r}, expected two numbers from 0 to below 1")
    if options.get("nesterov") and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise ValueError("nesterov needs a momentum above 0 and a dampening of 0")


def build_optimizers(
    model: nn.Module, columns: Mapping[str, Column], trajectory: Trajectory
) -> dict[int, Optimizer]:
    """One optimizer per group of the trajectory that has parameters: torch checks the options of a
    constructor, but not those of a group.

    Raises TrajectoryError: an unknown optimizer, unknown options, groups that name no parameter.
    """
    kind = find_optimizer(trajectory)
    groups: dict[int, list[nn.Parameter]] = {}
    for name, column in columns.items():
        number = trajectory.group_of(column.names)
        if number is not None:
            groups.setdefault(number, []).append(model.get_parameter(name))
    if not groups:
        raise TrajectoryError(
            f"{trajectory.path.name}: its groups name no parameter of the model",
            "the trajectory is of another model",
        )
    return {
        number: build_optimizer(kind, parameters, trajectory, number)
        for number, parameters in sorted(groups.items())
    }


def list_constructor_options(
    kind: type[Optimizer], trajectory: Trajectory, number: int
) -> dict[str, Any]:
    """A group's options in the form that torch's constructor takes."""
    given = {
        name: value
        for name, value in trajectory.groups[number].options.items()
        if name not in NOT_OPTIONS
    }
    if given.get("decoupled_weight_decay") == (
        kind is torch.optim.AdamW
    ):  # the name says it; not every torch takes the argument
        del given["decoupled_weight_decay"]
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
    }


def describe_refused_options(
    kind: type[Optimizer], trajectory: Trajectory, number: int, error: Exception
) -> TrajectoryError:
    options = list_constructor_options(kind, trajectory, number)
    return TrajectoryError(
        f"{trajectory.path.name}: torch's {kind.__name__} refuses these options: {error}",
        f"group {number}: {options}",
    )


def build_optimizer(
    kind: type[Optimizer], parameters: list[nn.Parameter], trajectory: Trajectory, number: int
) -> Optimizer:
    try:
        options = list_constructor_options(kind, trajectory, number)
        return kind(parameters, lr=0.0, **options)  # type: ignore[call-arg]  # of a subclass
    except (TypeError, ValueError, IndexError) as error:
        raise describe_refused_options(kind, trajectory, number, error) from error
