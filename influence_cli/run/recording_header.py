"""The header that the recorder writes: the optimizer, its options and its parameter groups."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from influence_cli.errors import TrajectoryError
from influence_cli.run.optimizer_state import map_parameter_names, optimizer_name
from influence_cli.run.trajectory_reader import FORMAT

Options = dict[str, Any]  # Any: JSON values
JSON = json.JSONEncoder(separators=(",", ":"), default=lambda tensor: tensor.item())
LEFT_OUT = ("lr", "capturable", "differentiable")  # lr is in each line; the others change nothing
# kernels that round in another way; None: torch's choice
KERNELS = ("foreach", "fused")


def read_group_options(optimizer: torch.optim.Optimizer) -> list[Options]:
    """Torch's arguments of each group, as JSON would return them; without what JSON can't hold."""
    groups: list[Options] = []
    for group in optimizer.param_groups:
        options: Options = {}
        for key in optimizer.defaults:
            if key in LEFT_OUT or key not in group or (key in KERNELS and group[key] is None):
                continue
            try:
                options[key] = json.loads(JSON.encode(group[key]))
            except (TypeError, ValueError, AttributeError, RuntimeError):
                continue
        groups.append(options)
    return groups


def build_header(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    group_options: list[Options],
    reduction: str,
) -> dict[str, Any]:  # Any: JSON values
    """The header names groups if there are several, or if one leaves out trained parameters."""
    names = map_parameter_names(model)
    groups = optimizer.param_groups
    members = [
        [names[id(parameter)] for parameter in group["params"] if id(parameter) in names]
        for group in groups
    ]
    foreign = sum(len(group["params"]) for group in groups) - sum(map(len, members))
    if foreign:
        raise TrajectoryError(
            f"the optimizer holds {foreign} parameters that are not the model's",
            "expected: parameters of the recorded model alone",
            "give the recorder the module that holds all",
        )
    first = group_options[0]
    header = {
        "format": FORMAT,
        "version": 1,
        "reduction": reduction,
        "optimizer": {"name": optimizer_name(optimizer)} | first,
    }
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if len(groups) > 1 or trained - set(members[0]):
        header["groups"] = [
            {"params": group_names}
            | {key: value for key, value in options.items() if value != first.get(key)}
            for group_names, options in zip(members, group_options, strict=True)
        ]
    return header


def list_differences(
    old: Mapping[Any, Any],
    new: Mapping[Any, Any],
    place: str = "",  # Any: JSON values
) -> list[str]:
    """Lines such as `optimizer.momentum: 0.9 before, 0.95 now`."""
    lines = []
    for key in dict.fromkeys((*old, *new)):
        before, now = old.get(key, "nothing"), new.get(key, "nothing")
        if isinstance(before, dict) and isinstance(now, dict):
            lines += list_differences(before, now, f"{place}{key}.")
        elif before != now:
            lines.append(f"{place}{key}: {before} before, {now} now")
    return lines
