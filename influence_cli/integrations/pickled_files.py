"""Reads pickled files: with torch.load(weights_only=True), or with inert placeholders."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from influence_cli.errors import CheckpointError, listed
from influence_cli.integrations.inert_pickle import read_inert

# what torch.load reads by itself, beside what inert_pickle does
READ_BY_TORCH = re.compile(
    r"torch\._utils\._rebuild|torch\._tensor\._rebuild|collections\.|torch\.nn\.parameter\."
    r"|torch\.(Tensor|device)$|torch\.serialization\._get_layout$|_codecs\.encode$"
    r"|builtins\.(bytearray|set|complex)$"
)


def read_pickled(path: Path, placeholders: bool = False) -> Any:  # Any: whatever the file holds
    """The content of a file of torch.save. Its code never runs.

    `placeholders`: classes other than tensors and plain containers become inert objects.
    Raises CheckpointError: such classes without `placeholders`; a damaged file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the protocol; an error says more
            # a zip file is memory-mapped: what is not converted is not read
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except pickle.UnpicklingError as error:
        if not placeholders:
            raise describe_refused_classes(path, error) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", "name a checkpoint file") from error
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise describe_damage(path, error) from error
    try:
        return read_inert(path)[0]
    except ValueError as error:
        raise describe_damage(path, error) from error


def describe_refused_classes(path: Path, error: Exception) -> CheckpointError:
    """The error for a file that names classes: lists them."""
    names = list_refused_classes(path) or re.findall(r"GLOBAL ([\w.]+)", str(error))
    if not names and not zipfile.is_zipfile(path):
        return describe_damage(path, error)
    if not names:
        return CheckpointError(
            f"{path} can't be read by torch.load(weights_only=True)",
            f"found: {shorten_reason(error)}",
            "add --placeholders: it reads more kinds of pickles, and imports and runs nothing",
        )
    return CheckpointError(
        f"{path} holds objects of classes that influence does not load",
        f"found: {listed(dict.fromkeys(names), 20)}; expected: tensors, numbers, texts, lists, "
        "dicts",
        "add --placeholders: it reads them as inert objects, and imports and runs nothing of them",
    )


def list_refused_classes(path: Path) -> list[str]:
    """The classes of a file that torch.load refuses; none for a file of another format."""
    try:
        names = read_inert(path)[1]
    except ValueError:
        return []
    return [name for name in names if not READ_BY_TORCH.match(name)]


def shorten_reason(error: Exception) -> str:
    """The line of torch's message that says what is wrong."""
    return str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0][:300]


def describe_damage(path: Path, error: Exception) -> CheckpointError:
    reason = shorten_reason(error)
    if not path.stat().st_size:
        reason = "it is empty (0 bytes)"
    elif not zipfile.is_zipfile(path) and isinstance(error, ValueError):
        reason += "; --placeholders reads only files of torch 1.6 or newer"
    return CheckpointError(
        f"{path} can't be read as a file of torch.save",
        f"found: {reason or type(error).__name__}",
        "copy it again, or load it in Python and save it with torch.save(model.state_dict(), FILE)",
    )
