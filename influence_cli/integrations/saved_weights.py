"""Finds weights, step and learning rate in the content of a checkpoint file."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import CheckpointError, listed
from influence_cli.integrations.inert_pickle import InertObject
from influence_cli.storage.safetensors_io import CODES

Content = Mapping[str, Any]  # Any: whatever a checkpoint file holds

WEIGHTS = ("state_dict", "model_state_dict", "model", "module", "app")
STEPS = ("global_step", "step", "iteration")
RATES = ("learning_rate", "lr")
OPTIMIZERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optim")
SCHEDULERS = ("lr_schedulers", "lr_scheduler", "scheduler", "scheduler_state_dict")
OUTER = "module."  # DataParallel and DistributedDataParallel
INNER = re.compile(  # torch.compile, FSDP, activation checkpointing: in front, and inside
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class SavedWeights:
    """What a checkpoint file holds, with the names of the bare module. `rates`: the distinct
    learning rates of its optimizer, which are those of the next step. `notes`: for the user."""

    tensors: dict[str, Tensor]
    step: int | None = None
    epoch: int | None = None
    rates: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


def as_mapping(value: object) -> Content | None:
    """A dict, or an inert object of a class that was a kind of dict; None for anything else."""
    if isinstance(value, InertObject):
        value = value.items
    return value if isinstance(value, Mapping) else None


def read_weights(content: object, name: str) -> SavedWeights:
    """Raises CheckpointError, about `name`: no weights, several, or tensors that can't be saved."""
    if (module := gather_module(content)) is not None:
        tensors, notes = clean_tensors(module, name, strip_outer=True)
        return SavedWeights(tensors, notes=notes)
    mapping = as_mapping(content)
    if mapping is None:
        raise CheckpointError(
            f"{name} holds no weights",
            f"found: {type(content).__name__}; expected: a dict of tensors, or one under "
            f"{listed(WEIGHTS[:4])}",
        )
    weights = select_weights(mapping, name)
    is_lightning = "pytorch-lightning_version" in mapping
    tensors, notes = clean_tensors(weights, name, strip_outer=not is_lightning)
    return SavedWeights(
        tensors,
        find_integer(mapping, STEPS),
        find_integer(mapping, ("epoch",)),
        tuple(dict.fromkeys(list_rates(mapping))),
        notes,
    )


def select_weights(content: Content, name: str) -> Content:
    """The mapping of weights: the content itself, or what stands under a usual key."""
    keys = [key for key in WEIGHTS if is_weights(content.get(key))]
    if len(keys) > 1:
        raise CheckpointError(
            f"{name} holds several models: {listed(keys)}",
            "expected: one",
            "load it in Python and save the right one with torch.save(model.state_dict(), FILE)",
        )
    if keys:
        value = content[keys[0]]
        if (module := gather_module(value)) is not None:
            return module
        inner = as_mapping(value)
        assert inner is not None
        holds_tensor = any(isinstance(item, Tensor) for item in inner.values())
        return inner if holds_tensor else select_weights(inner, name)
    known = {*STEPS, *RATES, *OPTIMIZERS, *SCHEDULERS, "epoch"}
    weights = {key: value for key, value in content.items() if key not in known}
    if not any(isinstance(value, Tensor) for value in weights.values()):
        raise CheckpointError(
            f"{name} holds no weights",
            f"found: {listed(content) or 'nothing'}; expected: tensors, or a dict of tensors "
            f"under {listed(WEIGHTS[:4])}",
        )
    return weights


def is_weights(value: object) -> bool:
    """Whether a value is a mapping with tensors, perhaps under one more usual key, or a module."""
    if gather_module(value) is not None:
        return True
    mapping = as_mapping(value)
    if not mapping:
        return False
    return any(isinstance(item, Tensor) for item in mapping.values()) or any(
        is_weights(mapping.get(key)) for key in WEIGHTS
    )


def gather_module(value: object, prefix: str = "") -> dict[str, object] | None:
    """The parameters and buffers of a pickled nn.Module, which was read as an inert object."""
    state = value.state if isinstance(value, InertObject) else None
    if not isinstance(state, dict) or not {"_parameters", "_buffers", "_modules"} <= state.keys():
        return None
    tensors: dict[str, object] = {}
    transient = state.get("_non_persistent_buffers_set") or ()
    for part in ("_parameters", "_buffers"):
        for key, tensor in (as_mapping(state[part]) or {}).items():
            if tensor is not None and not (part == "_buffers" and key in transient):
                tensors[f"{prefix}{key}"] = tensor
    for key, child in (as_mapping(state["_modules"]) or {}).items():
        tensors |= gather_module(child, f"{prefix}{key}.") or {}
    return tensors


# ---------------------------------------------------------------- tensors
def clean_tensors(
    weights: Content, name: str, strip_outer: bool
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by the bare module's names, each tied one once, and notes of what was dropped.

    `strip_outer`: drops the prefix of DataParallel where every name has it.
    """
    notes = []
    extra = [key for key in weights if str(key).endswith("_extra_state")]
    if extra:
        notes.append(f"{name}: {listed(extra)} is no tensor of the model and is left out")
    tensors = {str(key): value for key, value in weights.items() if key not in extra}
    refuse_unsavable(tensors, name)
    names = {key: INNER.sub("", key) for key in tensors}
    while strip_outer and names and all(key.startswith(OUTER) for key in names.values()):
        names = {key: bare.removeprefix(OUTER) for key, bare in names.items()}
    if len(set(names.values())) < len(names):
        bare_names = list(names.values())
        twice = sorted({bare for bare in bare_names if bare_names.count(bare) > 1})
        raise CheckpointError(
            f"{name} has two tensors for one name without the wrappers' prefixes",
            f"found twice: {listed(twice)}",
            "load it in Python and save model.state_dict() of the bare module",
        )
    first_names: dict[tuple[object, ...], str] = {}
    ties = []
    cleaned: dict[str, Tensor] = {}
    for key, value in tensors.items():
        bare = names[key]
        first = first_names.setdefault(place_of_tensor(value), bare) if value.numel() else bare
        if first == bare:
            cleaned[bare] = value.detach()
        else:
            ties.append(f"{bare} = {first}")
    if ties:
        notes.append(f"tied tensors are written once: {listed(ties)}")
    return cleaned, tuple(notes)


def place_of_tensor(value: Tensor) -> tuple[object, ...]:
    """Equal for two tensors that are the same numbers in memory."""
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride())


def refuse_unsavable(tensors: Mapping[str, object], name: str) -> None:
    """Raises CheckpointError for values that are no plain tensors."""
    odd = []
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            odd.append(f"{key} ({type(value).__name__})")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            odd.append(f"{key} (a sparse, quantized or meta tensor)")
        elif value.dtype not in CODES:
            odd.append(f"{key} ({value.dtype})")
    if odd:
        raise CheckpointError(
            f"{name} holds weights that safetensors can't hold",
            f"found: {listed(odd)}; expected: dense tensors",
            "load it in Python and save model.state_dict() of the bare module",
        )


# ---------------------------------------------------------------- step and learning rate
def find_integer(content: Content, keys: tuple[str, ...]) -> int | None:
    """The first of these entries that is a whole number from 0."""
    for key in keys:
        value = content.get(key)
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if math.isfinite(value) and value == int(value) and value >= 0:
            return int(value)
    return None


def list_rates(content: Content) -> Iterator[float]:
    """The learning rates of a checkpoint: its own entry, else of its optimizers' groups, else of
    its schedules."""
    sources = (
        [content.get(key) for key in RATES],
        [group.get("lr") for group in list_groups(content)],
        [
            rate
            for schedule in list_states(content, SCHEDULERS)
            if isinstance(rates := schedule.get("_last_lr"), list | tuple)
            for rate in rates
        ],
    )
    for values in sources:
        rates = [rate for value in values if (rate := as_rate(value)) is not None]
        if rates:
            yield from rates
            return


def as_rate(value: object) -> float | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    return None


def list_groups(content: Content) -> Iterator[Content]:
    """The parameter groups of all optimizers of a checkpoint."""
    for state in list_states(content, OPTIMIZERS):
        groups = state.get("param_groups")
        values = groups.values() if isinstance(groups, Mapping) else groups
        yield from (group for value in values or () if (group := as_mapping(value)) is not None)


def list_states(content: Content, keys: tuple[str, ...]) -> Iterator[Content]:
    """The mappings under these keys, and those in lists under them (Lightning keeps lists)."""
    for key in keys:
        value = content.get(key)
        for item in value if isinstance(value, list | tuple) else (value,):
            if (state := as_mapping(item)) is not None:
                yield state
    if (inner := as_mapping(content.get("app"))) is not None:
        yield from list_states(inner, keys)
