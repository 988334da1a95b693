"""Reads the zip files of torch.save without the classes that they name.

Tensors are read as they are. Every other class or function becomes an inert object: it keeps what
the file gives it, and runs nothing. Nothing is imported. The format is that of torch.save since
torch 1.6: a zip file with `data.pkl`, and the numbers of each storage in `data/KEY`.
"""

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


class InertObject:
    """An object of a class that was not imported. `state`: what the file set on it; `items`: what
    it put into it, if the class is a kind of dict."""

    state: Any = None  # Any: whatever the file holds

    def __new__(cls, *arguments: object, **options: object) -> "InertObject":
        made = object.__new__(cls)
        made.items = {}
        return made

    def __init__(self, *arguments: object, **options: object) -> None:
        self.items: dict[Any, Any]

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.items[key] = value

    def __call__(self, *arguments: object, **options: object) -> "InertObject":
        return InertObject()

    def append(self, value: object) -> None:
        """Lists are dropped: no checkpoint keeps its weights in one."""

    def extend(self, values: object) -> None:
        """The same."""

    def add(self, value: object) -> None:
        """The same, of a set."""


@dataclass(frozen=True)
class StoredNumbers:
    """The bytes of one storage, and the dtype of its numbers."""

    content: Tensor  # uint8
    dtype: torch.dtype


class Builder:
    """A function that a file may call. A file can't change it, as it could a function."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("the file sets attributes of a function")


def build_tensor(
    stored: StoredNumbers,
    offset: int,
    size: tuple[int, ...],
    stride: tuple[int, ...],
    *rest: object,
) -> Tensor:
    """A view of a storage. torch raises RuntimeError where it would leave the storage."""
    named = [value for value in rest if isinstance(value, torch.dtype)]
    dtype = named[0] if named else stored.dtype
    if not stored.content.numel():
        if math.prod(size):
            raise pickle.UnpicklingError("a tensor leaves its storage")
        return torch.empty(size, dtype=dtype)
    return stored.content.view(dtype).as_strided(size, stride, offset)


def unwrap_parameter(value: Tensor, *rest: object) -> Tensor:
    return value


PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names in protocol 2, torch's
BUILDERS: dict[str, object] = {
    "builtins.set": Builder(set),
    "collections.OrderedDict": Builder(OrderedDict),
    "torch.Size": Builder(tuple),
    "torch._utils._rebuild_tensor_v2": Builder(build_tensor),
    "torch._utils._rebuild_tensor_v3": Builder(build_tensor),
    "torch._utils._rebuild_parameter": Builder(unwrap_parameter),
    "torch._utils._rebuild_parameter_with_state": Builder(unwrap_parameter),
}


class InertUnpickler(pickle.Unpickler):
    """Builds tensors and plain containers. `refused`: the names of all other classes, as read."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.refused: dict[str, type[InertObject]] = {}
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:  # Any: a builder, a dtype or a class
        full = f"{PYTHON_2.get(module, module)}.{name}"
        if full in BUILDERS:
            return BUILDERS[full]
        if module in ("torch", "torch.storage", "torch.cuda") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        if full not in self.refused:
            self.refused[full] = type(name, (InertObject,), {})
        return self.refused[full]

    def persistent_load(self, pid: Any) -> StoredNumbers:  # Any: whatever the file holds
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage"):
            raise pickle.UnpicklingError("the file names something outside it that is no storage")
        dtype, key = pid[1], str(pid[2])
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"storage {key[:80]} has a kind that is unknown here")
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = (
                torch.frombuffer(content, dtype=torch.uint8)
                if content
                else torch.empty(0, dtype=torch.uint8)
            )
        return StoredNumbers(self._storages[key], dtype)


def read_inert(path: Path) -> tuple[Any, tuple[str, ...]]:  # Any: whatever the file holds
    """The content of a file, and the names of the classes that became inert objects.

    Raises ValueError for a file that torch.save did not write, or that is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            roots = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(roots) != 1:
                raise ValueError("it has no data.pkl, so torch.save did not write it")
            root = roots[0].removesuffix("/data.pkl")
            if f"{root}/byteorder" in archive.namelist():
                order = archive.read(f"{root}/byteorder").decode(errors="replace")
                if order != sys.byteorder:
                    raise ValueError(f"its numbers are in {order[:20]}-endian order")
            unpickler = InertUnpickler(archive, root)
            return unpickler.load(), tuple(sorted(unpickler.refused))
    except ValueError:
        raise
    except Exception as error:  # a hostile pickle raises what it likes
        raise ValueError(f"{type(error).__name__}: {error}") from error
