"""Adapters as peft saves them: few trained tensors, to be loaded over the weights of model().

A peft model is a model that peft.get_peft_model() or PeftModel.from_pretrained() returned. A
definition may also build the adapter's layers by itself, in a plain module.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, listed
from influence_cli.storage.json_text import read_json_file

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # peft writes it before each name of the base model
# options that change what the saved numbers mean
OPTIONS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("fan_in_fan_out", "target_modules", "feedforward_modules", "modules_to_save", "bias"),
)
DIGEST_PART = 1 << 24  # numbers copied at once


def is_peft_model(model: nn.Module) -> bool:
    return isinstance(getattr(model, "peft_config", None), Mapping)


def active_adapter(model: Any) -> str:  # Any: a PeftModel; peft may be absent
    name = model.active_adapter
    return name if isinstance(name, str) else str(name[0])


def list_adapter_keys(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Key in an adapter's file -> key of the model, for all tensors that such a file can hold.

    `tensors`: the model's, by key. Raises CheckpointError for an adapter that has no tensor of its
    own for a key (prompt learning).
    """
    if not is_peft_model(model):
        return {f"{PREFIX}{key}": key for key in tensors} | {key: key for key in tensors}
    from peft import get_peft_model_state_dict

    adapter = active_adapter(model)
    has_embeddings = hasattr(model, "get_input_embeddings")
    saved = get_peft_model_state_dict(
        model, dict(tensors), adapter, save_embedding_layers=has_embeddings
    )
    keys = {id(tensor): key for key, tensor in tensors.items()}
    derived = [key for key, tensor in saved.items() if id(tensor) not in keys]
    if derived:
        kind = getattr(model, "peft_config")[adapter].peft_type  # noqa: B009
        raise CheckpointError(
            f"adapters of the kind {getattr(kind, 'value', kind)} can't be read",
            f"peft computes what it saves: {listed(derived)}",
            "expected: LoRA, DoRA, IA3 or another kind that saves its parameters themselves",
        )
    return {key: keys[id(tensor)] for key, tensor in saved.items()}


def list_config_differences(folder: Path, model: nn.Module) -> list[str]:
    """Where a checkpoint's adapter_config.json differs from the adapter of a peft model."""
    path = folder / CONFIG
    if not is_peft_model(model) or not path.is_file():
        return []
    try:
        saved = dict(read_json_file(path))
    except (ValueError, TypeError, OSError) as error:
        return [f"{path.name} can't be read: {error}"]
    own = json.loads(describe_adapter(model))
    return [
        f"{CONFIG}: {name} is {saved[name]!r} in the file, {own[name]!r} in the model"
        for name in OPTIONS
        if name in saved and name in own and _ordered(saved[name]) != _ordered(own[name])
    ]


def describe_adapter(model: nn.Module) -> str:
    """The text of adapter_config.json for a peft model."""
    config = getattr(model, "peft_config")[active_adapter(model)]  # noqa: B009
    return json.dumps(config.to_dict() | {"inference_mode": True}, default=_plain, indent=2)


def select_adapter(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a peft model's tensors those that its adapter consists of, by their keys in a file."""
    return {key: tensors[name] for key, name in list_adapter_keys(model, tensors).items()}


def digest_base(tensors: Mapping[str, Tensor], adapter_keys: Collection[str]) -> str:
    """The sha256 of the model's tensors that the adapter does not hold: names, dtypes, values."""
    digest = hashlib.sha256()
    for key in sorted(tensors.keys() - set(adapter_keys)):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        flat = value.reshape(-1)
        for part in flat.split(DIGEST_PART) if flat.numel() else ():
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _plain(value: Any) -> Any:  # Any: JSON values
    return sorted(value) if isinstance(value, set) else str(getattr(value, "value", value))


def _ordered(value: Any) -> Any:  # Any: JSON values
    return sorted(set(value)) if isinstance(value, list) else value or None
