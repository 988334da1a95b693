"""Checks checkpoints against the model from their headers, and loads them strictly."""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, listed
from influence_cli.run.adapters import digest_base, list_adapter_keys, list_config_differences
from influence_cli.run.checkpoints import Checkpoint, Header, read_header
from influence_cli.run.converted_weights import has_conversion, read_converted
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
    """Ignores the prefixes of wrappers; one name of a tied tensor is enough. An adapter needs only
    the trained parameters.
    """
    tensors = list_tensors(model)
    if header.is_adapter:
        return map_adapter_keys(header, model, tensors)
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


def map_adapter_keys(header: Header, model: nn.Module, tensors: dict[str, Tensor]) -> KeyMap:
    model_keys = list_adapter_keys(model, tensors)
    file_keys = {model_keys[key]: key for key in header.tensors if key in model_keys}
    in_file = {id(tensors[key]) for key in file_keys}
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return KeyMap(
        file_keys,
        [name for name in trained if id(tensors[name]) not in in_file],
        {key: key for key in header.tensors if key not in model_keys},
    )


def strip_compiled(key: str) -> str:
    return re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", key)


# ---------------------------------------------------------------- checking
def check_fits_model(
    checkpoints: list[Checkpoint], model: nn.Module, cast: bool
) -> list[Checkpoint]:
    """Compares keys, shapes and dtypes of all checkpoints with the model, from their headers.

    `cast`: the user chose a precision, so floating-point dtypes may differ.
    Returns the checkpoints; those that transformers must convert are marked.
    Raises one CheckpointError for all checkpoints that do not fit.
    """
    misfits: dict[str, list[str]] = {}
    marked: list[Checkpoint] = []
    converted: dict[tuple[str, ...], list[str]] = {}  # lines without conversion -> with it
    for checkpoint in checkpoints:
        lines = list_misfits(read_header(checkpoint.files), model, cast)
        if checkpoint.is_adapter:
            lines += list_config_differences(checkpoint.path, model)
        elif needs_conversion(checkpoint, lines, model):
            key = tuple(lines)
            if key not in converted:
                converted[key] = list_converted_misfits(checkpoint, lines, model)
            lines = converted[key]
            checkpoint = replace(checkpoint, converted=True)
        marked.append(checkpoint)
        if lines:
            misfits[checkpoint.name] = lines
    if misfits:
        raise describe_misfits(misfits)
    return marked


def needs_conversion(checkpoint: Checkpoint, lines: list[str], model: nn.Module) -> bool:
    """Whether other misfits than dtypes exist, and transformers may convert them."""
    return not all(map(is_dtype_line, lines)) and has_conversion(checkpoint.path, model)


def list_converted_misfits(checkpoint: Checkpoint, lines: list[str], model: nn.Module) -> list[str]:
    """What does not fit after conversion; the lines without it where conversion fails."""
    try:
        return list(filter(is_dtype_line, lines)) + read_converted(checkpoint.path, model)[1]
    except (OSError, ValueError, RuntimeError) as error:
        return [f"transformers can't convert it: {error}", *lines]


def is_dtype_line(line: str) -> bool:
    return line.startswith("dtype")


def describe_misfits(misfits: dict[str, list[str]]) -> CheckpointError:
    """The error for checkpoints that do not fit. `misfits`: name -> lines."""
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
    elif all(map(is_dtype_line, lines)):
        details.append(
            "--precision float32 (or another) casts both; "
            "or build the model in the file's dtype in definition.py"
        )
    else:
        details.append(
            "the checkpoint was saved by another version of the model, "
            "or definition.py builds another size"
        )
    return CheckpointError(f"{first} does not fit the model in definition.py", *details)


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
        elif dtype != model_dtype and not (
            (cast and is_float(dtype)) or widens(dtype, model_dtype, model)
        ):
            names = [str(name).removeprefix("torch.") for name in (dtype, model_dtype)]
            lines.append(f"dtype:      {key} is {names[0]} in the file, {names[1]} in the model")
    return lines


def is_float(dtype: torch.dtype) -> bool:
    return dtype in PRECISIONS.values()


def widens(dtype: torch.dtype, model_dtype: torch.dtype, model: nn.Module) -> bool:
    """Whether a model of transformers gets values that its wider dtype holds exactly, as
    from_pretrained(dtype=...) gives them. Other models must have the dtype of their file.
    """
    if not (hasattr(type(model), "from_pretrained") and is_float(dtype) and is_float(model_dtype)):
        return False
    return torch.promote_types(dtype, model_dtype) == model_dtype


def describe_widening(checkpoints: list[Checkpoint], model: nn.Module) -> str:
    """A note where the model computes in a wider dtype than its files hold; else empty."""
    tensors = list_tensors(model)
    header = read_header(checkpoints[-1].files)
    for key, file_key in map_keys(header, model).file_keys.items():
        dtype, model_dtype = header.tensors[file_key][1], tensors[key].dtype
        if dtype != model_dtype and widens(dtype, model_dtype, model):
            names = [str(name).removeprefix("torch.") for name in (dtype, model_dtype)]
            return (
                f"the checkpoints hold {names[0]}, and model() computes in {names[1]}; "
                f"--precision {names[0]} computes in {names[0]}"
            )
    return ""


def add_base(checkpoints: list[Checkpoint], model: nn.Module) -> list[Checkpoint]:
    """The checkpoints; adapters with the digest of the weights of model() that lie below them."""
    digests: dict[tuple[str, ...], str] = {}
    result = []
    for checkpoint in checkpoints:
        if checkpoint.is_adapter:
            keys = tuple(map_keys(read_header(checkpoint.files), model).file_keys)
            if keys not in digests:
                digests[keys] = digest_base(list_tensors(model), keys)
            checkpoint = replace(checkpoint, base=digests[keys])
        result.append(checkpoint)
    return result


# ---------------------------------------------------------------- loading
def load_checkpoint(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copies a checked checkpoint's values into the model, in the model's dtype and device.

    Raises CheckpointError for values that are not finite, and for two names of a tied tensor with
    different values.
    """
    tensors = list_tensors(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    names = Counter(id(tensor) for tensor in tensors.values())
    tied: dict[int, tuple[str, Tensor]] = {}  # id of the model's tensor -> first key, its value
    broken, untied = [], []
    for key, value in read_values(checkpoint, model, tensors):
        # a buffer may hold -inf, as attention masks do
        if count := count_broken(value, infinite_is_broken=key in parameters):
            broken.append(f"{key}: {count:,} of {value.numel():,} values are NaN or infinite")
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


def read_values(
    checkpoint: Checkpoint, model: nn.Module, tensors: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a checked checkpoint, by its key of the model."""
    if checkpoint.converted:
        values, _ = read_converted(checkpoint.path, model)
        yield from ((key, value) for key, value in values.items() if key in tensors)
        return
    header = read_header(checkpoint.files)
    file_keys = map_keys(header, model).file_keys
    for file in checkpoint.files:
        with open_weights(file) as content:
            for key in keys_of_file(file, header, file_keys):
                yield key, content.read_compared([file_keys[key]])[file_keys[key]]


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
