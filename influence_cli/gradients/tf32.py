"""TF32: an NVIDIA GPU multiplies float32 numbers with 10 bits of each, several times as fast.

PyTorch uses it in convolutions unless someone forbids it. influence uses it only where the user
asks, with --precision tf32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EPS = 2.0**-10  # the distance of 1 to the next number


def allow_tf32(allowed: bool) -> None:
    """For all products and convolutions of this process from now on."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def without_tf32(used: bool) -> Iterator[None]:
    """Exact float32 products inside the block. `used`: whether TF32 is on around it."""
    allow_tf32(False)
    try:
        yield
    finally:
        allow_tf32(used)


@contextmanager
def tf32_during(allowed: bool) -> Iterator[None]:
    """`allow_tf32` inside the block. At its end the process has its own settings again."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    settings = [setting for backend in backends for setting in read_settings(backend)]
    try:
        allow_tf32(allowed)
        yield
    finally:
        for holder, name, value in settings:
            setattr(holder, name, value)


def read_settings(backend: Any) -> list[tuple[Any, str, Any]]:  # Any: torch's modules
    """What `allow_tf32` changes: (holder, attribute, value). Where the process used the newer
    settings of torch, it refuses to read the older one.
    """
    try:
        return [(backend, "allow_tf32", backend.allow_tf32)]
    except RuntimeError:
        holders = [getattr(backend, "conv", backend), getattr(backend, "rnn", backend)]
        return [(holder, "fp32_precision", holder.fp32_precision) for holder in holders]
