"""The random numbers of projections.

They come from the bits of PCG64 alone, so they are the same on every machine and in every version
of numpy and torch.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Tables:
    """Random numbers of one parameter, seen as a matrix of `rows` x `columns`.

    (seed, parameter, side) seeds each table, so parameters of one shape have different tables.
    """

    seed: int
    name: str
    rows: int
    columns: int
    device: torch.device
    dtype: torch.dtype

    def bits(self, side: str, count: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed}:{self.name}:{side}".encode()).digest()
        return np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(count)

    def signs(self, side: str, *shape: int) -> Tensor:
        """+1 and -1."""
        bits = self.bits(f"{side} signs", math.prod(shape)) >> 63
        return self._on_device(1.0 - 2.0 * bits.astype(np.float64).reshape(shape))

    def normal(self, side: str, *shape: int) -> Tensor:
        """Mean 0, variance 1 (Box and Muller 1958)."""
        uniform = (self.bits(f"{side} normal", 2 * math.prod(shape)) >> 11) / 2.0**53
        radius, angle = np.sqrt(-2 * np.log1p(-uniform[::2])), 2 * np.pi * uniform[1::2]
        return self._on_device((radius * np.cos(angle)).reshape(shape))

    def order(self, side: str, count: int) -> np.ndarray:
        """A random permutation of 0..count."""
        return np.argsort(self.bits(f"{side} order", count), kind="stable")

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.dtype).to(self.device)
