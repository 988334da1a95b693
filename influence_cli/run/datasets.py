"""The user's datasets as fixed sequences of examples: reads, batches and digests them."""

import array
import dataclasses
import hashlib
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, TensorDataset, default_collate

from influence_cli.errors import DataError, DefinitionError
from influence_cli.run.definition import Definition, describe_failure
from influence_cli.run.given_rows import GivenExamples, GivenRows

CACHED = 65_536  # descriptions, and distinct labels, in memory


class Examples:
    """One split of a run: `train` (the examples to rank) or `query` (predictions to explain).

    `given`: rows from the command line that replace the definition's dataset. `changed`: examples
    that replace those of the dataset, by index.
    """

    def __init__(
        self,
        definition: Definition,
        split: str,
        given: GivenRows | None = None,
        changed: Mapping[int, Any] | None = None,
    ) -> None:
        self.split, self.given = split, given
        self.source = given.source if given else f"{split}_data()"
        self._one_reader = threading.Lock()  # open files of a dataset are often not thread-safe
        self._definition, self._has_texts = definition, definition.has("describe")
        self._dataset = open_dataset(definition, split, given)
        if changed:
            self._dataset = ChangedExamples(self._dataset, changed)
        plain = type(self._dataset) is TensorDataset and not definition.has("collate")
        self._tensors = self._dataset.tensors if plain else None
        kind = type(self._dataset).__name__
        indexed = hasattr(self._dataset, "__getitem__") and hasattr(self._dataset, "__len__")
        if not indexed or isinstance(self._dataset, IterableDataset):
            raise DataError(
                f"{self.source} returned a {kind}, which can't be read by index",
                "expected: a map-style dataset, with len(dataset) and dataset[i]",
                "convert an iterable with list(...), or write it to disk once and index that",
            )
        try:
            self._length = len(self._dataset)
        except Exception as error:
            raise DataError(
                f"len() of {self.source} raised {type(error).__name__}: {error}"
            ) from error
        if not self._length:
            raise DataError(f"{self.source} is empty", "expected: at least one example")
        # bounded, so that memory stays flat
        self._cached_description = lru_cache(maxsize=CACHED)(self._describe)
        self._label_numbers = array.array("i", [-1]) * self._length  # -1: not read yet
        self._labels: dict[str, int] = {}  # the distinct labels, in the order of their numbers
        self._label_texts: list[str] = []

    def __len__(self) -> int:
        return self._length

    @property
    def key(self) -> str:
        """What the cache calls the split: rows from the command line have a place of their own."""
        return f"{self.split}-{self.given.digest[:16]}" if self.given else self.split

    def set_labels(self, labels: dict[int, int]) -> None:
        """Give rows from the command line that have no label one: index -> class number."""
        self._dataset.labels.update(labels)
        self._cached_description.cache_clear()
        for index in labels:
            self._label_numbers[index] = -1

    def item(self, index: int) -> Any:
        """Example `index` as the dataset gives it. Raises DataError naming the example."""
        try:
            with self._one_reader:
                return self._dataset[int(index)]
        except DataError as error:  # of a table or of an integration
            headline = f"example {index} of {self.source}: {error.headline}"
            raise DataError(headline, *error.details) from error
        except (Exception, SystemExit) as error:
            why = describe_failure(self._definition, self.source.removesuffix("()"), error)
            raise DataError(
                f"{self.source} raised {type(error).__name__} at example {index}: {error}",
                *why.details,
                f"it has {self._length:,} examples",
            ) from error

    def items(self, ids: Sequence[int] | np.ndarray) -> list[Any]:
        return [self.item(index) for index in ids]

    def collate(self, items: list[Any]) -> Any:
        if self._definition.has("collate"):
            return self._definition.call("collate", items)
        try:
            return default_collate(items)
        except Exception as error:
            raise DataError(
                f"examples of {self.source} can't be batched by torch's default collate: {error}",
                "examples of different sizes need a collate(items) in definition.py",
            ) from error

    def batch(self, ids: Sequence[int] | np.ndarray) -> Any:
        """These examples, collated. Indexes a plain TensorDataset, with the same result."""
        if self._tensors is None:
            return self.collate(self.items(ids))
        return [tensor[torch.as_tensor(ids, dtype=torch.int64)] for tensor in self._tensors]

    def digests(self, ids: Sequence[int] | np.ndarray) -> torch.Tensor:
        """(N,) the `digest` of each of these examples, int64."""
        if self._tensors is None or not all(
            tensor.is_cpu and tensor.dtype != torch.bfloat16 for tensor in self._tensors
        ):
            return torch.tensor([self.digest(index) for index in ids], dtype=torch.int64)
        values = [zlib.crc32(b"tuple")] * len(ids)
        for tensor in self._tensors:
            rows = tensor[torch.as_tensor(ids, dtype=torch.int64)].numpy()
            name = f"{tensor.dtype}{tuple(tensor.shape[1:])}".encode()
            values = [
                zlib.crc32(row, zlib.crc32(name, value))
                for row, value in zip(rows, values, strict=True)
            ]
        return torch.tensor(values, dtype=torch.int64)

    @cached_property
    def digest_of_all(self) -> str:
        """Of the contents of all examples, which it reads once."""
        return hashlib.sha256(str(self.digests(range(len(self))).tolist()).encode()).hexdigest()

    def digest(self, index: int) -> int:
        """The digest of an example. Raises DataError where a part of it can't be read."""
        item = self.item(index)
        try:
            return digest_item(item)
        except Exception as error:  # a __repr__ of the user, an int of 5,000 digits
            raise DataError(
                f"example {index} of {self.source} can't be read: it holds a value that raises "
                f"{type(error).__name__} when it is printed",
                "expected: numbers, texts, tensors, arrays, images, and containers of them",
            ) from error

    def check_stable(self, ids: Sequence[int] | np.ndarray) -> None:
        """Reads each example twice. Raises DataError where the two differ."""
        for index in ids:
            if self.digest(index) != self.digest(index):
                raise DataError(
                    f"{self.source} changes between reads: two reads of example {index} differ",
                    "expected: the same example at the same index each time",
                    "switch random augmentation off in definition.py",
                )

    def label(self, index: int) -> str:
        """Read once for each example, as long as there are at most CACHED distinct labels."""
        number = self._label_numbers[int(index)]
        if number >= 0:
            return self._label_texts[number]
        label = self._cached_description("label", int(index))
        if label in self._labels or len(self._labels) < CACHED:
            self._label_numbers[int(index)] = self._labels.setdefault(label, len(self._labels))
            if len(self._label_texts) < len(self._labels):
                self._label_texts.append(label)
        return label

    def text(self, index: int) -> str:
        return self._cached_description("describe", int(index)) if self._has_texts else ""

    def own_id(self, index: int) -> str:
        """The user's id of an example; empty where the definition has no `id`, or it gave None."""
        return self._cached_description("id", int(index))

    def _describe(self, function: str, index: int) -> str:
        if not self._definition.has(function):
            return ""
        value = self._definition.call(function, self.item(index))
        if (
            isinstance(value, torch.Tensor | np.ndarray | np.generic)
            and getattr(value, "ndim", 0) == 0
        ):
            value = value.item()
        try:
            return "" if value is None else str(value)
        except Exception as error:  # a __str__ or __repr__ of the user, an int of 5,000 digits
            raise DefinitionError(
                f"{function}() of example {index} of {self.source} returned a "
                f"{type(value).__name__} that can't be printed: {type(error).__name__}",
                "expected: a text",
            ) from error


class ChangedExamples:
    """A dataset some of whose examples are replaced, by index."""

    def __init__(self, dataset: Any, changed: Mapping[int, Any]) -> None:  # of any class
        self._dataset, self._changed = dataset, changed

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Any:
        return self._changed[index] if index in self._changed else self._dataset[index]


def open_dataset(definition: Definition, split: str, given: GivenRows | None) -> Any:
    """The user's dataset, of any class, or the one of rows from the command line."""
    return GivenExamples(definition, given) if given else definition.call(f"{split}_data")


def digest_item(item: Any) -> int:
    """A 32-bit digest of one example: numbers, text, bytes, tensors, arrays, images, and nested
    containers of them. Of other objects only the type counts."""
    value = 0

    def add(part: Any) -> None:
        nonlocal value
        name, content = _encode_part(part)
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))
        for child in _list_children(part):
            add(child)

    add(item)
    return value


def _encode_part(part: Any) -> tuple[str, Any]:
    """The type and shape of an example's part, and its content as a buffer."""
    if isinstance(part, torch.Tensor):
        part = part.to_dense() if part.layout != torch.strided else part
        flat = part.detach().cpu().contiguous().reshape(-1)
        return f"{part.dtype}{tuple(part.shape)}", flat.view(
            torch.uint8
        ).numpy() if flat.numel() else b""
    if isinstance(part, np.ndarray | np.generic) and part.dtype != object:
        return f"{part.dtype}{part.shape}", np.ascontiguousarray(part).view(
            np.uint8
        ) if part.size and part.ndim else part.tobytes()
    if isinstance(part, bool | int | float | complex | str | type(None)):
        return type(part).__name__, repr(part).encode("utf-8", "surrogatepass")
    if isinstance(part, bytes | bytearray | memoryview):
        return "bytes", bytes(part)
    pixels: Callable[[], bytes] | None = getattr(
        part, "tobytes", None
    )  # PIL images, without importing PIL
    size = getattr(part, "size", "")
    return f"{type(part).__name__}{size if isinstance(size, tuple) else ''}", pixels() if callable(
        pixels
    ) else b""


def _list_children(part: Any) -> list[Any]:
    if isinstance(part, Mapping):
        return [child for key, value in part.items() for child in (key, value)]
    if isinstance(part, list | tuple):
        return list(part)
    if isinstance(part, np.ndarray) and part.dtype == object:
        return list(part.flat)
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return [getattr(part, field.name) for field in dataclasses.fields(part)]
    return []
