"""What this machine offers: free memory, the speed of a disk."""

import contextlib
import os
import shutil
import sys
import time
from pathlib import Path

import torch

from influence_cli.errors import CacheError
from influence_cli.storage.safetensors_io import write_tensors
from influence_cli.storage.scratch import ScratchFolder

TRIAL_BYTES = 128 << 20  # written to measure a disk


def existing_folder(folder: Path) -> Path:
    """The folder itself, or the nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def check_fits(folder: Path | None, disk_bytes: int, memory_bytes: int) -> None:
    """Raise CacheError where the disk of the cache has no room for `disk_bytes`, or this machine
    has no `memory_bytes` of free memory.
    """
    if folder is not None:
        free = shutil.disk_usage(existing_folder(folder)).free
        if disk_bytes > free:
            raise CacheError(
                f"the gradients do not fit on the disk of the cache {folder}",
                f"needed: {disk_bytes:,} bytes; free: {free:,} bytes",
                "--store float16 halves a float32 cache; --layers GLOB and --steps select less",
                "--cache DIR names another disk; --cache none stores nothing",
            )
    available = available_memory()
    if available is not None and memory_bytes > available:
        raise CacheError(
            "capturing these gradients does not fit into memory",
            f"needed: about {memory_bytes:,} bytes more; available: {available:,} bytes",
            "--batch-size N computes fewer examples at once; --layers GLOB selects fewer "
            "parameters",
        )


def available_memory() -> int | None:
    """Bytes that this process can still allocate, by the machine and its control group; None where
    the system does not tell."""
    limits: list[int] = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        limits.append(int(line.split()[1]) * 1024)
    with contextlib.suppress(OSError, ValueError):
        files = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        limit, used = (file.read_text().strip() for file in files)
        limits.append(int(limit) - int(used))
    if not limits:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits) if limits else None


def keep_freed_memory() -> None:
    """Let glibc keep up to 1 GiB of freed memory for the next batch, which allocates the same
    sizes.

    Fetching it from the system again costs a tenth of a capture's time on W3 (docs/log.md).
    Systems without glibc ignore this.
    """
    import ctypes

    options = {-3: 32 << 20, -1: 1 << 30, -2: 64 << 20}  # M_MMAP_, M_TRIM_THRESHOLD, M_TOP_PAD
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in options.items():
            mallopt(option, value)


def peak_memory() -> int:
    """The largest number of bytes that this process has used so far."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def disk_speed(folder: Path, direct: bool, count: int = TRIAL_BYTES) -> float:
    """Bytes per second of synced writing next to `folder`, as units are written; 0 where that
    fails.
    """
    try:
        with ScratchFolder(existing_folder(folder)) as trial:
            content = {"zeros": torch.zeros(count, dtype=torch.int8)}
            start = time.perf_counter()
            write_tensors(trial / "speed", content, {}, direct)
            return count / (time.perf_counter() - start)
    except OSError:
        return 0.0


def free_cuda_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]
