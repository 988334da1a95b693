"""The one reader and the one writer of safetensors files.

safetensors' own writer copies every tensor first, and its reader maps files page by page. At
gigabytes that costs as much processor time as computing the gradients. This module moves few large
pieces between memory and disk. Large caches bypass the system's page cache, which they would only
fill; data that is already in the page cache is memory-mapped (docs/log.md has the numbers). The
files are ordinary safetensors files, and equal content gives equal bytes.
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

from influence_cli.storage import checksums
from influence_cli.storage.atomic import replace_file
from influence_cli.storage.json_text import parse_json

# O_DIRECT, which bypasses the page cache, needs positions, lengths and addresses in multiples
PAGE = 4096
PIECE = 8 << 20  # bytes of one read or write
MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors library
MAX_AXES = 64  # the limit of torch
CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {code: dtype for dtype, code in CODES.items()}
DIRECT = getattr(os, "O_DIRECT", 0)  # 0: the system has no O_DIRECT

FREE: dict[int, list[mmap.mmap]] = {}  # size -> unused blocks, to be read into again
FREE_BYTES = 512 << 20


def allocate_pages(size: int) -> np.ndarray:
    """Page-aligned bytes, in huge pages where the system has them. The block is reused once the
    array and all its views are deleted. Private: a forked process writes into its own copy.

    The system zeroes fresh memory page by page, which takes as long as reading a cached file.
    """
    size = max(PAGE, -(-size // PAGE) * PAGE)
    free = FREE.get(size)
    block = free.pop() if free else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if not free and hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(block, dtype=np.uint8)
    weakref.finalize(array, recycle_block, block, size)
    return array


def recycle_block(block: mmap.mmap, size: int) -> None:
    if size + sum(size * len(blocks) for size, blocks in FREE.items()) <= FREE_BYTES:
        FREE.setdefault(size, []).append(block)


# ---------------------------------------------------------------- writing
def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], direct: bool = False
) -> None:
    """Writes a file that appears complete or not at all. `direct`: bypasses the page cache.

    Raises OSError, and KeyError for a dtype that safetensors files can't hold.
    """
    with replace_file(path) as temporary:
        stream_tensors(temporary, tensors, metadata, direct)


def stream_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], direct: bool
) -> None:
    # large elements first, so that all are aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    values = {name: tensors[name].detach().cpu() for name in names}
    sums = checksums.checksum_metadata(values)  # first: no other text comes before its blank
    head: dict[str, object] = {"__metadata__": sums | dict(metadata) | sums}
    start = 0
    for name in names:
        value = tensors[name]
        stop = start + value.numel() * value.element_size()
        head[name] = {
            "dtype": CODES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(head, separators=(",", ":")).encode()
    padding = b" " * (-(8 + len(text)) % PAGE)  # the tensors begin on a page
    text = checksums.sealed_header(text + padding)
    with BlockWriter(path, direct) as file:
        file.write(np.frombuffer(len(text).to_bytes(8, "little") + text, dtype=np.uint8))
        for value in values.values():
            if value.numel():
                file.write(value.contiguous().view(-1).view(torch.uint8).numpy())


class BlockWriter:
    """A file that is written in pieces from one reused block of memory."""

    def __init__(self, path: Path, direct: bool) -> None:
        self.direct = bool(direct and DIRECT)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.file = os.open(path, flags | (DIRECT if self.direct else 0), 0o666)
        except OSError as error:
            if not self.direct or error.errno != errno.EINVAL:
                raise
            self.direct = False  # this file system has no O_DIRECT
            self.file = os.open(path, flags, 0o666)
        self.block = allocate_pages(PIECE)
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
        """Appends bytes. The copy releases Python's lock, so other threads compute meanwhile."""
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
    """The position of a tensor in its file, in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TruncatedFile(ValueError):
    """A safetensors file that is shorter than its header says."""


class TensorFile:
    """An opened safetensors file. Raises ValueError for a header that is invalid or does not fit
    the file's size; TruncatedFile where bytes are missing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = os.open(path, os.O_RDONLY)
        try:
            self.size = os.fstat(self.file).st_size
            length = int.from_bytes(os.pread(self.file, 8, 0), "little")
            if self.size < 8:
                raise TruncatedFile(f"{self.size} bytes, less than the 8 of a header's length")
            if length > MAX_HEADER:
                raise ValueError(f"its first bytes give a header of {length:,} bytes")
            if length > self.size - 8:
                raise TruncatedFile(f"its header alone has {length:,} bytes")
            text = os.pread(self.file, length, 8)
            self.metadata, self.entries = read_head(text, 8 + length, self.size)
            self.checksums = checksums.read_checksums(text, self.metadata)
        except BaseException:
            os.close(self.file)
            raise

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *ended: object) -> None:
        os.close(self.file)

    def verify(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError: whole tensors that differ from their checksums, or a file of none."""
        if self.checksums is None:
            raise ValueError("it has no checksums")
        checksums.compare_checksums(tensors, self.checksums)

    def read_compared(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The same as `read`, compared with the checksums if influence wrote the file."""
        tensors = self.read(names)
        if self.checksums is not None:
            self.verify(tensors)
        return tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, in new memory. Neighbours in the file are read together.

        Raises KeyError for an unknown name.
        """
        wanted = sorted(
            {name: self.entries[name] for name in names}.items(), key=lambda item: item[1].start
        )
        tensors: dict[str, Tensor] = {}
        first = 0
        for last in range(1, len(wanted) + 1):
            if last == len(wanted) or wanted[last][1].start > wanted[last - 1][1].stop + PIECE // 8:
                tensors |= self._read_span(wanted[first:last])
                first = last
        return tensors

    def read_rows(self, name: str, rows: np.ndarray) -> Tensor:
        """Only these rows (rising indices of the first axis) of a tensor, in new memory."""
        entry = self.entries[name]
        size = (entry.stop - entry.start) // entry.shape[0]
        block = allocate_pages(size * len(rows))
        ends = [*(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]  # of runs without a gap
        for first, end in zip([0, *ends[:-1]], ends, strict=True):
            view = block[first * size : end * size].data
            position = entry.start + int(rows[first]) * size
            done = 0
            while done < len(view):
                count = os.preadv(self.file, [view[done:]], position + done)
                if count <= 0:
                    raise TruncatedFile("it ends before its last tensor")
                done += count
        return (
            torch.from_numpy(block[: size * len(rows)])
            .view(entry.dtype)
            .view(len(rows), *entry.shape[1:])
        )

    def _read_span(self, wanted: list[tuple[str, TensorSpan]]) -> dict[str, Tensor]:
        """Neighbouring tensors, as views of one block."""
        start = wanted[0][1].start // PAGE * PAGE
        stop = max(entry.stop for _, entry in wanted)
        block = self._map_cached(start, stop)
        if block is None:
            block = allocate_pages(stop - start)
            self._fill(block, start, stop)
        content, tensors = torch.from_numpy(block), {}
        for name, entry in wanted:
            values = content[entry.start - start : entry.stop - start]
            if entry.start % entry.dtype.itemsize:
                values = values.clone()  # a writer that does not align tensors
            tensors[name] = values.view(entry.dtype).view(entry.shape)
        return tensors

    def _map_cached(self, start: int, stop: int) -> np.ndarray | None:
        """Memory-maps a large span that is in the page cache, without a copy; else None.

        Writes to it stay in this process.
        """
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
        """Reads start..stop into a block: from the page cache if it is there, else bypassing it."""
        file, view, done = self.file, block.data, 0
        direct = -1
        if DIRECT and stop - start > PIECE and not self._cached(start, stop):
            try:
                file = direct = os.open(self.path, os.O_RDONLY | DIRECT)
            except OSError:  # this file system has no O_DIRECT
                direct = -1
        try:
            while done < stop - start:
                count = os.preadv(file, [view[done : done + PIECE]], start + done)
                if count <= 0:
                    raise TruncatedFile("it ends before its last tensor")
                done += count
        finally:
            if direct >= 0:
                os.close(direct)

    def _cached(self, start: int, stop: int) -> bool:
        """Whether the middle of a span is in the page cache. Its start may be there with the
        header."""
        try:
            return os.preadv(self.file, [bytearray(1)], (start + stop) // 2, os.RWF_NOWAIT) == 1
        except (OSError, AttributeError):
            return False


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in new memory, compared. Raises ValueError, like TensorFile."""
    with TensorFile(path) as file:
        return file.read_compared(file.entries)


def read_head(text: bytes, begin: int, size: int) -> tuple[dict[str, str], dict[str, TensorSpan]]:
    """Metadata and entries of a header; offsets become positions in the file of `size` bytes.

    `begin`: position of the first tensor. The tensors must fill the file without gap or overlap.
    """
    try:
        head = parse_json(text)
        metadata = head.pop("__metadata__", {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise ValueError("its metadata holds more than texts")
        entries = {}
        for name, entry in head.items():
            shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
            if type(entry["shape"]) is not list or {*map(type, (*shape, first, last))} != {int}:
                raise ValueError(f"{name[:80]} has a shape or an offset that is not whole")
            if len(shape) > MAX_AXES or min(shape, default=0) < 0:
                raise ValueError(f"{name} has a shape that no tensor has")
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name[:80]} has the dtype {entry['dtype']!r:.20}, unknown here")
            entries[name] = TensorSpan(DTYPES[entry["dtype"]], shape, begin + first, begin + last)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"its header is invalid: {type(error).__name__} {error}") from error
    end = begin
    for name, span in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        count = math.prod(span.shape) * span.dtype.itemsize
        if span.start != end or span.stop - span.start != count:
            raise ValueError(f"its header is invalid: {name} has wrong offsets")
        end = span.stop
    if end > size:
        raise TruncatedFile(f"{end:,} bytes expected")
    if end < size:
        raise ValueError(f"it has {size - end:,} bytes after its last tensor")
    return metadata, entries
