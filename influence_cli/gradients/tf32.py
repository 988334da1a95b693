"""TF32: an NVIDIA GPU multiplies float32 numbers with 10 bits of each, several times as fast.

PyTorch uses it in convolutions unless someone forbids it. influence uses it only where the user
asks, with --precision tf32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

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
