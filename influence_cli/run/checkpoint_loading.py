"""Checks checkpoints against the model from their headers, and loads them strictly."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, listed
from influence_cli.run.checkpoints import Checkpoint, Header, read_header
from influence_cli.run.parameters import PRECISIONS, WRAPPERS
from influence_cli.storage.checksums import ChangedTensor
from influence_cli.storage.safetensors_io import TensorFile

SHOWN_LINES = 30  # of misfits in an error


@dataclass(frozen=True)
class KeyMap:
    """Which tensor of a file belongs to which of the model."""

    file_keys: dict[str, str]  # model key -> file key
    missing: list[str]  # model keys
    unexpected: dict[str, str]  # file key without wrapper prefix -> file key


def list_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of the model holds: parameters and persistent buffers. A tied tensor is
    there under each of its names."""
    return {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor)
    }


def map_keys(header: Header, model: nn.Module) -> KeyMap:
    """Ignores the prefixes of wrappers; one name of a tied tensor is enough."""
    tensors = list_tensors(model)
    names = {key: key for key in header.tensors}
    for prefix in WRAPPERS * 2:
        if names and all(key.startswith(prefix) for key in names):
            names = {key.removeprefix(prefix): file_key for key, file_key in names.items()}
    # torch.compile may wrap a module inside the model, in training or in definition.py
    model_keys = {strip_compiled(key): key for key in tensors}
    bare = {strip_compiled(key): file_key for key, file_key in names.items()}
    if len(bare) == len(names):
        names = {model_keys.get(key, key): file_key for key, file_key in bare.items()}
    in_file = {id(tensor) for key, tensor in tensors.items() if key in names}
    return KeyMap(
        {key: names[key] for key in tensors if key in names},
        [key for key, tensor in tensors.items() if id(tensor) not in in_file],
        {key: file_key for key, file_key in names.items() if key not in tensors},
    )


def strip_compiled(key: str) -> str:
    return re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", key)


# ---------------------------------------------------------------- checking
def check_fits_model(checkpoints: list[Checkpoint], model: nn.Module, cast: bool) -> None:
    """Compares keys, shapes and dtypes of all checkpoints with the model, from their headers.

    `cast`: the user chose a precision, so floating-point dtypes may differ.
    Raises one CheckpointError for all checkpoints that do not fit.
    """
    misfits: dict[str, list[str]] = {}
    for checkpoint in checkpoints:
        if lines := list_misfits(read_header(checkpoint.files), model, cast):
            misfits[checkpoint.name] = lines
    if not misfits:
        return
    first, lines = next(iter(misfits.items()))
    same = [name for name in misfits if misfits[name] == lines]
    others = [name for name in misfits if name not in same]
    details = lines[:SHOWN_LINES]
    if len(lines) > SHOWN_LINES:
        details.append(f"... and {len(lines) - SHOWN_LINES:,} more lines like these")
    if len(same) > 1:
        details.append(f"the same in: {listed(same[1:])}")
    if others:
        details.append(f"other misfits in: {listed(others)}")
    if any("float8" in line for line in lines):
        details.append(
            "float8 values have scales of their own: dequantize the model and save it in bfloat16 "
            "or float32 (transformers: model.dequantize())"
        )
    elif all(line.startswith("dtype") for line in lines):
        details.append(
            "--precision float32 (or another) casts both; "
            "or build the model in the file's dtype in definition.py"
        )
    else:
        details.append(
            "the checkpoint was saved by another version of the model, "
            "or definition.py builds another size"
        )
    raise CheckpointError(f"{first} does not fit the model in definition.py", *details)


def list_misfits(header: Header, model: nn.Module, cast: bool) -> list[str]:
    tensors = list_tensors(model)
    keys = map_keys(header, model)
    lines = [f"missing:    {key} {tuple(tensors[key].shape)}" for key in keys.missing]
    lines += [
        f"unexpected: {key} {header.tensors[file_key][2]}"
        for key, file_key in keys.unexpected.items()
    ]
    for key, file_key in keys.file_keys.items():
        _, dtype, shape = header.tensors[file_key]
        model_dtype, model_shape = tensors[key].dtype, tuple(tensors[key].shape)
        if shape != model_shape:
            lines.append(f"shape:      {key} is {shape} in the file, {model_shape} in the model")
        elif dtype != model_dtype and not (cast and dtype in PRECISIONS.values()):
            names = [str(name).removeprefix("torch.") for name in (dtype, model_dtype)]
            lines.append(f"dtype:      {key} is {names[0]} in the file, {names[1]} in the model")
    return lines


# ---------------------------------------------------------------- loading
def load_checkpoint(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies a checked checkpoint's values into the model, in the model's dtype and device.

    Raises CheckpointError for values that are not finite, and for two names of a tied tensor with
    different values.
    """
    header = read_header(checkpoint.files)
    file_keys = map_keys(header, model).file_keys
    tensors = list_tensors(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = Counter(id(tensor) for tensor in tensors.values())
    tied: dict[int, tuple[str, Tensor]] = {}  # id of the model's tensor -> first key, its value
    broken, untied = [], []
    for file in checkpoint.files:
        with open_weights(file) as content, torch.no_grad():
            for key in keys_of_file(file, header, file_keys):
                value = content.read_compared([file_keys[key]])[file_keys[key]]
                # a buffer may hold -inf, as attention masks do
                if count := count_broken(value, infinite_is_broken=key in parameters):
                    broken.append(
                        f"{key}: {count:,} of {value.numel():,} values are NaN or infinite"
                    )
                if names[id(tensors[key])] > 1:
                    first, first_value = tied.setdefault(id(tensors[key]), (key, value))
                    if first != key and not torch.equal(first_value, value):
                        untied.append(f"{first} and {key}")
                tensors[key].data.copy_(value)
    if broken:
        raise CheckpointError(
            f"{checkpoint.name} holds values that are not finite",
            *broken,
            "training had diverged; leave this checkpoint out with --steps",
        )
    if untied:
        raise CheckpointError(
            f"{checkpoint.name} holds two values of one tied tensor",
            *untied,
            "definition.py ties parameters that were trained separately; build them untied",
        )


@contextmanager
def open_weights(file: Path) -> Iterator[TensorFile]:
    """Raises CheckpointError for a file that was removed or damaged."""
    try:
        with TensorFile(file) as content:
            yield content
    except ChangedTensor as error:
        raise CheckpointError(
            f"{file} is damaged: {error}", "copy it again, or leave it out with --steps"
        ) from error
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file} changed or vanished during this command: {error}",
            "finished work is kept; save or copy it again and run the same command",
        ) from error


def keys_of_file(file: Path, header: Header, file_keys: dict[str, str]) -> list[str]:
    """The model's keys of the tensors in one file."""
    return [key for key, file_key in file_keys.items() if header.tensors[file_key][0] == file]


def count_broken(value: Tensor, infinite_is_broken: bool) -> int:
    """The number of NaNs, and of infinite values where those count."""
    if not value.is_floating_point() or not value.numel():
        return 0
    is_valid = torch.isfinite if infinite_is_broken else is_number
    if all(bool(is_valid(bound)) for bound in torch.aminmax(value)):
        return 0
    return int((~is_valid(value)).sum())


def is_number(values: Tensor) -> Tensor:
    return ~torch.isnan(values)
