"""Safetensors files of a cache: written, and read in parts, without a copy of the whole.

safetensors' own functions copy every tensor before it is written and map files page by page when they are read; at gigabytes that costs the
processor as much as taking the gradients. Here few large pieces go between memory and disk, and large caches past the system's page cache,
which they would only fill; what lies in it is used where it lies (docs/log.md has the numbers). The files are ordinary safetensors files.
"""

import errno
import json
import math
import mmap
import os
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAGE = (
    4096  # what positions, lengths and addresses are multiples of where the page cache is left out
)
PIECE = 8 << 20
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.int8: "I8",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
DIRECT = getattr(os, "O_DIRECT", 0)  # 0: this system has no such way


FREE: dict[
    int, list[mmap.mmap]
] = {}  # memory that nothing refers to any more, by its size, to be read into again
FREE_BYTES = 512 << 20


def memory(size: int) -> np.ndarray:
    """Page-aligned bytes, in large pages where the system gives them; reused once the array and all that is seen through it are gone.

    Fresh memory is handed out page by page and zeroed: as long as reading a file that the page cache holds.
    """
    size = max(PAGE, -(-size // PAGE) * PAGE)
    waiting = FREE.get(size)
    block = waiting.pop() if waiting else mmap.mmap(-1, size)
    if not waiting and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(array, release, block, size)
    return array


def release(block: mmap.mmap, size: int) -> None:
    if size + sum(size * len(blocks) for size, blocks in FREE.items()) <= FREE_BYTES:
        FREE.setdefault(size, []).append(block)


# ---------------------------------------------------------------- writing
def save(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], direct: bool = False
) -> None:
    """Write a file; not synced. `direct`: past the page cache, where the file system allows it. Tensors lie on the CPU."""
    names = sorted(
        tensors, key=lambda name: (-tensors[name].element_size(), name)
    )  # wide numbers first: each then lies aligned
    head: dict[str, object] = {"__metadata__": dict(metadata)}
    at = 0
    for name in names:
        value = tensors[name]
        size = value.numel() * value.element_size()
        head[name] = {
            "dtype": CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % PAGE)  # the numbers begin on a page
    with BlockWriter(path, direct) as file:
        file.write(np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8))
        for name in names:
            if tensors[name].numel():
                file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())


class BlockWriter:
    """A file that is written in pieces of one reused block of memory."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.direct = bool(direct and DIRECT)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.file = os.open(path, flags | (DIRECT if self.direct else 0), 0o666)
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self.direct, self.file = (
                False,
                os.open(path, flags, 0o666),
            )  # a file system without that way
        self.block = memory(PIECE)
        self.filled, self.size = 0, 0

    def __enter__(self) -> "BlockWriter":
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        try:
            if kind is None:
                self._flush(-(-self.filled // PAGE) * PAGE if self.direct else self.filled)
                os.ftruncate(self.file, self.size)
        finally:
            os.close(self.file)

    def write(self, content: np.ndarray) -> None:
        """Bytes; the copy into the block leaves Python's lock to whoever computes."""
        self.size += len(content)
        done = 0
        while done < len(content):
            count = min(PIECE - self.filled, len(content) - done)
            np.copyto(self.block[self.filled : self.filled + count], content[done : done + count])
            self.filled, done = self.filled + count, done + count
            if self.filled == PIECE:
                self._flush(PIECE)

    def _flush(self, size: int) -> None:
        done = 0
        while done < size:
            done += os.write(self.file, self.block[done:size].data)
        self.filled = 0


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class TensorSpan:
    """Where a tensor lies in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """An opened safetensors file. Raises ValueError where its header and its size do not fit together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        try:
            self.size = os.fstat(self.file).st_size
            length = int.from_bytes(os.pread(self.file, 8, 0), "little")
            if self.size < 8 or length > self.size - 8:
                raise ValueError(f"{self.size} bytes are less than its header says")
            self.metadata, self.entries = read_head(
                os.pread(self.file, length, 8), 8 + length, self.size
            )
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *ended: object) -> None:
        os.close(self.file)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, in memory of their own; neighbours in the file are read at once. Raises KeyError for a name that is not there."""
        wanted = sorted(
            {name: self.entries[name] for name in names}.items(), key=lambda item: item[1].start
        )
        found: dict[str, Tensor] = {}
        first = 0
        for last in range(1, len(wanted) + 1):
            if last == len(wanted) or wanted[last][1].start > wanted[last - 1][1].stop + PIECE // 8:
                found |= self._stretch(wanted[first:last])
                first = last
        return found

    def read_rows(self, name: str, rows: np.ndarray) -> Tensor:
        """Only these rows, rising, of a tensor that has one for each example, in memory of their own."""
        entry = self.entries[name]
        size = (entry.stop - entry.start) // entry.shape[0]
        block = memory(size * len(rows))
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]  # of stretches without a gap
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            view, position, done = (
                block[first * size : end * size].data,
                entry.start + int(rows[first]) * size,
                0,
            )
            while done < len(view):
                got = os.preadv(self.file, [view[done:]], position + done)
                if got <= 0:
                    raise ValueError("it ends before its last tensor")
                done += got
        return (
            torch.from_numpy(block[: size * len(rows)])
            .view(entry.dtype)
            .view(len(rows), *entry.shape[1:])
        )

    def _stretch(self, wanted: list[tuple[str, TensorSpan]]) -> dict[str, Tensor]:
        start = wanted[0][1].start // PAGE * PAGE
        stop = max(entry.stop for _, entry in wanted)
        block = self._mapped(start, stop)
        if block is None:
            block = memory(stop - start)
            self._fill(block, start, stop)
        whole, found = torch.from_numpy(block), {}
        for name, entry in wanted:
            count = math.prod(entry.shape)
            offset = entry.start - start
            found[name] = (
                whole[offset : offset + count * entry.dtype.itemsize]
                .view(entry.dtype)
                .view(entry.shape)
            )
        return found

    def _mapped(self, start: int, stop: int) -> np.ndarray | None:
        """The page cache itself, where a large stretch lies there: no copy is made. What is written to it is this process's own."""
        if (
            stop - start <= PIECE // 8
            or PAGE % mmap.ALLOCATIONGRANULARITY
            or not self._cached(start, stop)
        ):
            return None
        view = mmap.mmap(
            self.file,
            stop - start,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=start,
        )
        view.madvise(mmap.MADV_WILLNEED)
        return np.frombuffer(view, dtype=np.uint8)

    def _fill(self, block: np.ndarray, start: int, stop: int) -> None:
        """Read start..stop: from the page cache where it is there, else past it."""
        file, view, done = self.file, block.data, 0
        direct = -1
        if DIRECT and stop - start > PIECE and not self._cached(start, stop):
            try:
                file = direct = os.open(self.path, os.O_RDONLY | DIRECT)
            except OSError:  # a file system without that way
                direct = -1
        try:
            while done < stop - start:
                got = os.preadv(file, [view[done : done + PIECE]], start + done)
                if got <= 0:
                    raise ValueError("it ends before its last tensor")
                done += got
        finally:
            if direct >= 0:
                os.close(direct)

    def _cached(self, start: int, stop: int) -> bool:
        """Whether the middle of a stretch is in the page cache; its beginning is read with the header."""
        try:
            return os.preadv(self.file, [bytearray(1)], (start + stop) // 2, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):
            return False


def read_head(text: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, TensorSpan]]:
    """Metadata and entries of a header; offsets become positions in the file. Raises ValueError for one that can't be right."""
    head = json.loads(text)
    metadata = head.pop("__metadata__", {})
    entries = {}
    for name, entry in head.items():
        start, stop = (begin + int(offset) for offset in entry["data_offsets"])
        dtype, shape = DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        if stop - start != math.prod(shape) * dtype.itemsize or start < begin or stop > size:
            raise ValueError(f"{name} does not fit into its place")
        entries[name] = TensorSpan(dtype, shape, start, stop)
    if begin + sum(entry.stop - entry.start for entry in entries.values()) != size:
        raise ValueError(f"its tensors do not add up to its {size} bytes")
    return metadata, entries
