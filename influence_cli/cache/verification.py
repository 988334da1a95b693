"""Which stored gradients are compared with their checksums when they are read.

Headers, losses and norms always are. Gradients are, as long as that takes at most SHARE of the
time since the program began; `always`: all of them (--verify).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from influence_cli.storage.safetensors_io import TensorFile

SHARE = 0.05
BYTES_PER_SECOND = 2 << 30  # of CRC-32, a low estimate
START = time.perf_counter()


@dataclass
class Verification:
    """`seconds`: spent so far. `skipped`: bytes that were read and not compared."""

    always: bool = False
    seconds: float = 0.0
    skipped: int = 0

    def verify(self, file: TensorFile, tensors: Mapping[str, Tensor]) -> None:
        """Compares whole tensors with their checksums, or counts their bytes. Raises ValueError."""
        size = count_bytes(tensors)
        begin = time.perf_counter()
        expected = self.seconds + size / BYTES_PER_SECOND
        if not self.always and expected > SHARE * (begin - START):
            self.skip(tensors)
            return
        file.verify(tensors)
        self.seconds += time.perf_counter() - begin

    def skip(self, tensors: Mapping[str, Tensor]) -> None:
        self.skipped += count_bytes(tensors)


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())
