"""What a request weighs: bytes per example of each column, examples captured at once, examples of a unit. Probed once, then recorded.

The record, sizes.json beside the units, keeps the cut the same on every machine that goes on with a cache: units and the batches in them
follow from it.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from influence_cli.cache.store import UNIT_BYTES, read_json, write_json, writing
from influence_cli.errors import CacheError

BATCH_BYTES = 384 << 20  # working memory of a batch on the CPU; about what its caches and allocator like
BATCH_MOST = 512


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
            forms = {str(name): (str(kind), int(count)) for name, (kind, count) in found["forms"].items()}
            return cls(path, forms, {str(key): (max(1, int(n)), int(count)) for key, (n, count) in found["batches"].items()})
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"{path} does not list forms and batches ({error})", "delete it; it is measured again") from error

    def add(self, columns: Sequence[str], forms: dict[str, tuple[str, int]], batch: int, working: int) -> None:
        """Record what a probe found; what is known of a column stays as it is."""
        self.forms = forms | self.forms
        self.batches[key_of(columns)] = batch, working
        if self.path is not None:
            with contextlib.suppress(CacheError), writing(self.path.parent):  # a read-only cache serves all the same
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
        return min(8 * BATCH_MOST, floor_power(torch.cuda.mem_get_info(device)[0] // 4 // max(1, working)))
    return min(BATCH_MOST, floor_power(BATCH_BYTES // max(1, working)))


def floor_power(number: int) -> int:
    """The largest power of two that is not above `number`, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def available_memory() -> int | None:
    """Bytes that this process may still take, by the machine and its control group; None where the system does not say."""
    found: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        found.append(int(limit) - int(used))
    if not found:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def used_memory() -> int:
    """Resident bytes of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def stored_bytes(tensors: dict[str, Any], examples: int, ratio: float) -> int:
    """Bytes per example of a form's tensors, its floating-point ones scaled by the store's width."""
    return round(sum(v.numel() * v.element_size() * (ratio if v.is_floating_point() else 1) for v in tensors.values()) / examples)
