"""Bytes of a request: per example of each column, per batch, per unit. A probe measures them once.

The record is sizes-SPLIT.json beside the units. Units and batches follow from it, so it keeps them
the same on every machine that resumes a cache.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from influence_cli.cache.identity import Settings
from influence_cli.cache.quantize import SCALED
from influence_cli.cache.store import UNIT_BYTES, UNIT_EXAMPLES
from influence_cli.cache.unit_file import Level
from influence_cli.errors import CacheError, shown
from influence_cli.extraction.machine import free_cuda_bytes
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.embedding_capture import EmbeddingCapture
from influence_cli.gradients.forms import Form
from influence_cli.storage.atomic import make_folders, read_json, report_disk_errors, write_json

BATCH_BYTES = 384 << 20  # working memory of a batch on a CPU: what its caches and allocator like
MAX_BATCH = 1024

AnyCapture = Capture | EmbeddingCapture


@dataclass
class SizeRecord:
    """The measured sizes of one split.

    `forms`: per column its form and its bytes per example, as stored. `batches`: per set of columns
    the examples of a batch, and the working bytes of one example.
    """

    path: Path | None
    forms: dict[str, tuple[str, int]] = field(default_factory=dict)
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None, split: str) -> "SizeRecord":
        """The record of a settings folder, or an empty one. Raises CacheError: a broken record."""
        path = folder / f"sizes-{split}.json" if folder else None
        if path is None or not path.is_file():
            return cls(path)
        content = read_json(path)
        try:
            forms = {
                name: (read_kind(kind), read_size(count))
                for name, (kind, count) in content["forms"].items()
            }
            batches = {
                key: (max(1, read_size(examples)), read_size(count))
                for key, (examples, count) in content["batches"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CacheError(
                f"{path} is broken",
                f"expected: forms and batches; found: {error}",
                "delete that file: influence measures the sizes again",
            ) from error
        return cls(path, forms, batches)

    def add(
        self, columns: Sequence[str], forms: dict[str, tuple[str, int]], batch: int, working: int
    ) -> None:
        """Record the result of a probe. Sizes of columns that are known already stay as they
        are.
        """
        self.forms = forms | self.forms
        self.batches[columns_key(columns)] = batch, working
        if self.path is not None:
            with (
                contextlib.suppress(CacheError),
                report_disk_errors(self.path.parent),
            ):  # may be read-only
                make_folders(self.path.parent, self.path.parent.parent)
                write_json(self.path, {"forms": self.forms, "batches": self.batches})

    def has_forms(self, columns: Sequence[str]) -> bool:
        return all(name in self.forms for name in columns)

    def has_batch(self, columns: Sequence[str]) -> bool:
        return columns_key(columns) in self.batches

    def example_bytes(self, columns: Sequence[str]) -> int:
        """Bytes of one example's gradients, as stored."""
        return sum(self.forms[name][1] for name in columns)

    def batch(self, columns: Sequence[str]) -> int:
        """Examples of a batch."""
        return self.batches[columns_key(columns)][0]

    def working_bytes(self, columns: Sequence[str]) -> int:
        """Bytes that one example of a batch needs while it is computed."""
        return self.batches[columns_key(columns)][1]

    def unit_examples(self, columns: Sequence[str]) -> int:
        """Examples of a unit: a power of two, by the bytes of these columns."""
        fitting = UNIT_BYTES // max(1, self.example_bytes(columns))
        return min(UNIT_EXAMPLES, floor_power_of_two(fitting))


def read_kind(value: object) -> str:
    """The name of a form. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is not the name of a form")
    return value


def read_size(value: object) -> int:
    """A number of bytes or examples. Raises ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{shown(value)} is not a whole number from 0")
    return value


class MemoryBudget:
    """Batch and unit sizes of a run's gradients, and the disk and memory that a request needs."""

    def __init__(
        self,
        settings: Settings,
        device: torch.device,
        folder: Path | None,
        requested_batch_size: int | None,
        measure: Callable[[str, Sequence[str]], tuple[dict[str, Form], float]],
        split_size: Callable[[str], int],
        split_key: Callable[[str], str] = str,
    ) -> None:
        """`folder`: of the records, None for none. `requested_batch_size`: the user's, if any.
        `measure`: (split, columns) -> forms of a few examples, and the bytes of one example's
        activations.
        `split_size`: the number of examples of a split. `split_key`: the name of its record."""
        self.settings, self.device = settings, device
        self.requested_batch_size = requested_batch_size
        self._folder, self._measure, self._split_size = folder, measure, split_size
        self._split_key = split_key
        self.records: dict[str, SizeRecord] = {}

    def record(self, split: str) -> SizeRecord:
        """The record as it is, without a probe."""
        if split not in self.records:
            self.records[split] = SizeRecord.open(self._folder, self._split_key(split))
        return self.records[split]

    def sizes(self, split: str, columns: Sequence[str]) -> SizeRecord:
        """The record with these columns in it; a probe measures those that are new."""
        record = self.record(split)
        if not (record.has_forms(columns) and record.has_batch(columns)):
            sample, activations = self._measure(split, columns)
            dtype = self.settings.storage_dtype
            ratio = dtype.itemsize / self.settings.precision.itemsize
            forms = stored_bytes(sample, ratio, 4 if dtype in SCALED else 0)
            form_bytes = sum(form.nbytes // len(form) for form in sample.values())
            working = round(activations) * 2 + form_bytes
            record.add(columns, forms, default_batch(working, self.device), working)
        return record

    def batch_size(self, split: str, columns: Sequence[str]) -> int:
        """Examples that are computed at once: the user's number, else the recorded one."""
        return self.requested_batch_size or self.sizes(split, columns).batch(columns)

    def halve_batch_size(self, split: str, columns: Sequence[str]) -> int:
        """Record half the batch size, after a device ran out of memory; returns it."""
        record = self.sizes(split, columns)
        half = max(1, record.batch(columns) // 2)
        record.add(columns, {}, half, record.working_bytes(columns))
        return half

    def unit_size(self, split: str, columns: Sequence[str], level: Level) -> int:
        """Examples of a unit: a power of two, by the bytes of these columns."""
        if level == "norms":
            return UNIT_EXAMPLES // 4
        record = self.record(split)
        if not record.has_forms(columns):
            record = self.sizes(split, columns)
        return record.unit_examples(columns)

    def needs(
        self, split: str, columns: Sequence[str], cells: int, level: Level = "values"
    ) -> tuple[int, int]:
        """Bytes of disk and of memory for so many (checkpoint, example) pairs.

        The memory holds a batch, a unit that fills, and a unit that is written.
        """
        record = self.sizes(split, columns)
        cell_bytes = 16 + 8 * len(columns)
        if level == "norms":
            return cells * cell_bytes, self._batch_bytes(split, columns)
        cell_bytes += record.example_bytes(columns)
        units = 2 * self.unit_size(split, columns, level)
        examples = min(units, self._split_size(split), cells)
        return cells * cell_bytes, self._batch_bytes(split, columns) + examples * cell_bytes

    def _batch_bytes(self, split: str, columns: Sequence[str]) -> int:
        """Host memory of a batch; on a GPU the batch takes none."""
        if self.device.type == "cuda":
            return 0
        working = self.sizes(split, columns).working_bytes(columns)
        return working * self.batch_size(split, columns)


def columns_key(columns: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(columns)).encode()).hexdigest()[:12]


def default_batch(working: int, device: torch.device) -> int:
    """Examples of a batch by the working bytes of each: on a CPU the same on every machine, on a
    GPU a quarter of its free memory.
    """
    if device.type == "cuda":
        fitting = free_cuda_bytes(device) // 4 // max(1, working)
        return min(4 * MAX_BATCH, floor_power_of_two(fitting))
    return min(MAX_BATCH, floor_power_of_two(BATCH_BYTES // max(1, working)))


def floor_power_of_two(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def stored_bytes(
    forms: Mapping[str, Form], ratio: float, scale_bytes: int
) -> dict[str, tuple[str, int]]:
    """Form and bytes per example of each column, as stored.

    `ratio`: bytes of a stored number per byte of a computed one. `scale_bytes`: of a row's scale.
    Two columns may share a tensor (a bias's gradients are its layer's left factors): the first
    column counts it, the other is "shared".
    """
    sizes: dict[str, tuple[str, int]] = {}
    counted: set[tuple[int, int]] = set()
    for name, form in forms.items():
        tensors = [
            tensor
            for tensor in form.tensors().values()
            if (tensor.data_ptr(), tensor.numel()) not in counted or not tensor.numel()
        ]
        counted |= {(tensor.data_ptr(), tensor.numel()) for tensor in tensors}
        count = 0.0
        for tensor in tensors:
            floating = tensor.is_floating_point()
            count += tensor.numel() * tensor.element_size() * (ratio if floating else 1)
            count += scale_bytes * len(tensor) if floating else 0
        sizes[name] = (form.kind if tensors else "shared", round(count / len(form)))
    return sizes
