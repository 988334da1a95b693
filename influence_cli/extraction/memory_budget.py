"""What a request weighs: bytes per example of each column, examples captured at once, examples of a unit. Probed once, then recorded.

The record, sizes.json beside the units, keeps the cut the same on every machine that goes on with a cache: units and the batches in them
follow from it.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from influence_cli.cache.store import UNIT_BYTES
from influence_cli.errors import CacheError
from influence_cli.gradients.forms import Form
from influence_cli.storage.atomic import read_json, sync, write_json, writing
from influence_cli.storage.safetensors_io import save

BATCH_BYTES = (
    384 << 20
)  # working memory of a batch on the CPU; about what its caches and allocator like
BATCH_MOST = 1024
TRIAL = 128 << 20  # bytes written to measure a disk


@dataclass
class Sizes:
    """Of one split: per column its form and bytes per example, as stored; per set of columns the batch and its bytes per example."""

    path: Path | None
    forms: dict[str, tuple[str, int]] = field(default_factory=dict)
    batches: dict[str, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path | None, split: str) -> "Sizes":
        """The record of a settings folder, or an empty one. Raises CacheError where it can't be read."""
        path = folder / f"sizes-{split}.json" if folder else None
        if path is None or not path.is_file():
            return cls(path)
        found = read_json(path)
        try:
            forms = {
                str(name): (str(kind), int(count)) for name, (kind, count) in found["forms"].items()
            }
            return cls(
                path,
                forms,
                {
                    str(key): (max(1, int(n)), int(count))
                    for key, (n, count) in found["batches"].items()
                },
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(
                f"{path} does not list forms and batches ({error})",
                "delete it; it is measured again",
            ) from error

    def add(
        self, columns: Sequence[str], forms: dict[str, tuple[str, int]], batch: int, working: int
    ) -> None:
        """Record what a probe found; what is known of a column stays as it is."""
        self.forms = forms | self.forms
        self.batches[key_of(columns)] = batch, working
        if self.path is not None:
            with (
                contextlib.suppress(CacheError),
                writing(self.path.parent),
            ):  # a read-only cache serves all the same
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"forms": self.forms, "batches": self.batches})

    def knows(self, columns: Sequence[str]) -> bool:
        return all(name in self.forms for name in columns)

    def bytes_of(self, columns: Sequence[str]) -> int:
        """What the gradients of one example take as stored."""
        return sum(self.forms[name][1] for name in columns)

    def unit(self, columns: Sequence[str], most: int) -> int:
        """Examples of a unit: a power of two, by the bytes of these columns."""
        return min(most, floor_power(UNIT_BYTES // max(1, self.bytes_of(columns))))


def key_of(columns: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(columns)).encode()).hexdigest()[:12]


def batch_for(working: int, device: torch.device) -> int:
    """Examples captured at once, by the working bytes of each: on the CPU the same on every machine, on a GPU a quarter of what is free."""
    if device.type == "cuda":
        return min(
            4 * BATCH_MOST, floor_power(torch.cuda.mem_get_info(device)[0] // 4 // max(1, working))
        )
    return min(BATCH_MOST, floor_power(BATCH_BYTES // max(1, working)))


def floor_power(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def check_fits(folder: Path | None, stored: int, memory: int) -> None:
    """Raise CacheError where the disk of the cache has no room for `stored` bytes, or this process none for `memory` more."""
    if folder is not None:
        free = shutil.disk_usage(
            next(path for path in (folder, *folder.absolute().parents) if path.exists())
        ).free
        if stored > free:
            raise CacheError(
                f"the gradients do not fit on the disk of the cache {folder}",
                f"{stored:,} bytes are to be stored, {free:,} are free",
                "--store float16 halves a float32 cache, --layers GLOB takes fewer parameters, --steps fewer checkpoints",
                "--cache DIR puts it elsewhere, --cache none keeps nothing",
            )
    available = available_memory()
    if available is not None and memory > available:
        raise CacheError(
            "capturing these gradients does not fit into memory",
            f"about {memory:,} bytes more are needed, {available:,} are available",
            "--batch-size N takes fewer examples at once, --layers GLOB fewer parameters",
        )


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and its control group; None where the system does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(
            int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        )
    with contextlib.suppress(OSError, ValueError):
        limit, used = (
            Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current")
        )
        found.append(int(limit) - int(used))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, up to 1 GiB, instead of handing it back to the system and fetching it anew, page by page, a moment
    later: every batch allocates the same sizes. A tenth of a capture's time on W3 (benchmarks/README.md). Elsewhere: nothing."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in (
            (-3, 32 << 20),
            (-1, 1 << 30),
            (-2, 64 << 20),
        ):  # M_MMAP_THRESHOLD (its maximum), M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


def peak_memory() -> int:
    """The most bytes that this process has held so far."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def disk_speed(folder: Path, direct: bool, count: int = TRIAL) -> float:
    """Bytes per second of synced writing beside `folder`, as units are written; 0 where nothing can be written there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-influence-", dir=there) as place:
            content = {"zeros": torch.zeros(count, dtype=torch.int8)}
            started = time.perf_counter()
            save(Path(place) / "speed", content, {}, direct)
            sync(Path(place) / "speed")
            return count / (time.perf_counter() - started)
    except OSError:
        return 0.0


def weigh(forms: Mapping[str, Form], ratio: float, scale: int) -> dict[str, tuple[str, int]]:
    """Form and bytes per example of each column as stored, floating-point numbers scaled by the store's width and `scale` bytes for each of
    their rows. What is kept once for two columns (the gradients of a bias are its layer's left factors) weighs in the first; the other is
    "shared"."""
    found: dict[str, tuple[str, int]] = {}
    seen: set[tuple[int, int]] = set()
    for name, form in forms.items():
        tensors = [
            value
            for value in form.tensors().values()
            if (value.data_ptr(), value.numel()) not in seen or not value.numel()
        ]
        seen |= {(value.data_ptr(), value.numel()) for value in tensors}
        count = sum(
            v.numel() * v.element_size() * (ratio if v.is_floating_point() else 1) for v in tensors
        )
        count += scale * sum(len(v) for v in tensors if v.is_floating_point())
        found[name] = (form.kind if tensors else "shared", round(count / len(form)))
    return found
