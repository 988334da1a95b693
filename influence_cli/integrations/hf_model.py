"""Builds the model of a Hugging Face folder: from its config, or a base model with an adapter."""

import re
from pathlib import Path
from typing import Any

import torch

from influence_cli.errors import CheckpointError, DefinitionError, listed
from influence_cli.integrations.extras import import_library
from influence_cli.run.adapters import CONFIG as ADAPTER_CONFIG
from influence_cli.run.checkpoints import ADAPTER, read_header
from influence_cli.run.converted_weights import quiet_loading
from influence_cli.storage.json_text import read_json_file

HEAD = re.compile(r"\.(classifier|score|classifier\.out_proj)\.weight$")
SEED = 0  # of weights that no file holds: a new process must build the same ones


def is_adapter_folder(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()


def find_base(folder: Path, base: Path | None) -> Path:
    """The folder of the base model below an adapter. Raises DefinitionError where it is not on
    this machine.
    """
    if base is not None:
        if (base / "config.json").is_file():
            return base
        raise DefinitionError(
            f"no base model in {base}", "expected: a folder with config.json and the weights"
        )
    name = str(read_json_file(folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
    for place in (Path(name), folder / name, folder.parent / name):
        if (place / "config.json").is_file():
            return place
    cached = find_in_hub_cache(name)
    if cached is not None:
        return cached
    raise DefinitionError(
        f"the base model {name} of {folder.name} is not on this machine",
        f"{folder / ADAPTER_CONFIG} names it; influence asks no model hub",
        "give its folder: base=Path(...) in definition.py, or influence init --base DIR",
    )


def find_in_hub_cache(name: str) -> Path | None:
    """The folder of a model that an earlier download stored on this machine."""
    hub = import_library("huggingface_hub", "hf")
    try:
        path = hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of a hub
        return None
    return Path(path).parent if isinstance(path, str) else None


def read_head_size(folder: Path) -> int | None:
    """The number of classes of the head that an adapter brings; None where it brings none."""
    path = folder / ADAPTER
    if not path.is_file():
        return None
    tensors = read_header((path,)).tensors
    sizes = [shape[0] for key, (_, _, shape) in tensors.items() if HEAD.search(key)]
    return sizes[0] if sizes else None


def load_config(folder: Path, **changes: Any) -> Any:  # Any: a PretrainedConfig
    """The config of a folder. Raises DefinitionError where it can't be read."""
    transformers = import_library("transformers", "hf")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **changes)
    except (OSError, ValueError, KeyError) as error:
        raise DefinitionError(
            f"{folder / 'config.json'} can't be read: {first_line(error)}",
            "expected: the config.json of a model that transformers knows",
        ) from error
    config.use_cache = False  # of keys and values of earlier tokens: training has none
    return config


def build_from_config(auto_class: str, config: Any, dtype: torch.dtype) -> Any:  # Any: a model
    """A model with random weights, to load checkpoints into."""
    transformers = import_library("transformers", "hf")
    torch.manual_seed(SEED)
    try:
        return getattr(transformers, auto_class).from_config(config, dtype=dtype)
    except ValueError as error:
        raise DefinitionError(
            f"transformers has no {auto_class} for a {config.model_type}", first_line(error)
        ) from error


def build_with_adapter(
    auto_class: str, config: Any, base: Path, folder: Path, dtype: torch.dtype
) -> Any:  # Any: a PeftModel
    """The base model with the adapter of `folder`, which is trained.

    Raises CheckpointError where neither the base folder nor the adapter has some weights.
    """
    transformers = import_library("transformers", "hf")
    peft = import_library("peft", "hf")
    torch.manual_seed(SEED)
    auto = getattr(transformers, auto_class)
    try:
        with quiet_loading():
            model, info = auto.from_pretrained(
                base, config=config, dtype=dtype, local_files_only=True, output_loading_info=True
            )
            adapted = peft.PeftModel.from_pretrained(model, folder, is_trainable=True)
    except (ValueError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"the adapter {folder.name} does not fit the base model {base}", first_line(error)
        ) from error
    own = {
        name.replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    random = sorted(set(info["missing_keys"]) - own)
    if random:
        raise CheckpointError(
            f"the base model {base} lacks weights that the adapter does not replace",
            f"missing: {listed(random)}",
            "give the base model that training started from: base=..., or modules_to_save",
        )
    return adapted


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
