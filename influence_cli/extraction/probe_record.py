"""The way of capture that a probe chose, remembered beside the sizes of a cache.

One file, probe-SPLIT-DIGEST.json, for all that the choice depends on: the texts of the definition,
the model, the columns, the first examples, the device, and the versions of torch and influence.
Where anything differs, the model is probed again. The weights do not count: each checkpoint of a
model has the same operations.
"""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from influence_cli import __version__
from influence_cli.errors import CacheError
from influence_cli.storage.atomic import make_folders, read_json, report_disk_errors, write_json

# the keys of a choice: of parameters, of an embedding's output
CHOICES = ({"at_once", "batched", "hooked", "why_not_hooked"}, {"at_once", "axis"})


@dataclass(frozen=True)
class ProbeRecord:
    """What a probe chose (`Capture.choice`), and the notes that the probe gave."""

    choice: dict[str, Any]  # Any: JSON values
    notes: tuple[str, ...]


def record_path(folder: Path, split: str, parts: Sequence[object]) -> Path:
    """`parts`: all that the choice depends on."""
    versions = [__version__, torch.__version__]
    digest = hashlib.sha256(json.dumps([*versions, *parts]).encode()).hexdigest()[:16]
    return folder / f"probe-{split}-{digest}.json"


def read_record(path: Path) -> ProbeRecord | None:
    """None where there is none. Raises CacheError: a broken record."""
    if not path.is_file():
        return None
    remedy = "delete that file: influence probes the model again"
    content = read_json(path, remedy)
    choice, notes = content.get("choice"), content.get("notes")
    if (
        not isinstance(choice, dict)
        or set(choice) not in CHOICES
        or not isinstance(notes, list)
        or not all(isinstance(note, str) for note in notes)
    ):
        raise CacheError(f"{path} is broken", "expected: a choice and notes", remedy)
    return ProbeRecord(choice, tuple(notes))


def write_record(path: Path, record: ProbeRecord) -> None:
    """Nothing where the cache is read-only."""
    with contextlib.suppress(CacheError), report_disk_errors(path.parent):
        make_folders(path.parent, path.parent.parent)
        write_json(path, {"choice": record.choice, "notes": list(record.notes)})


def describe_model(model: torch.nn.Module) -> str:
    """A digest of its modules and of the shapes of its parameters and buffers."""
    tensors = [
        (name, str(tensor.dtype), list(tensor.shape))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    return hashlib.sha256(json.dumps([kind, str(model), tensors]).encode()).hexdigest()
