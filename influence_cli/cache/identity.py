"""What a cached row depends on; refuses rows that differ from the run."""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.cache.quantize import STORE_EPS
from influence_cli.errors import CacheError, CheckpointError
from influence_cli.gradients.form_ops import distance
from influence_cli.gradients.projection import Projection
from influence_cli.gradients.tf32 import EPS as TF32_EPS
from influence_cli.storage.atomic import read_json, write_json
from influence_cli.storage.checksums import digest_header, digest_tensors


class CheckpointFiles(Protocol):
    """What the cache reads of a checkpoint."""

    @property
    def step(self) -> int: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def base(self) -> str: ...


class Shaped(Protocol):
    """What the cache reads of a column."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Settings:
    """How gradients are computed and stored: both dtypes, and the projection if any.

    `mixed`: the model keeps parameters of several dtypes; `precision` is the widest of them.
    `tf32`: float32 numbers are multiplied in TF32.
    """

    precision: torch.dtype
    storage_dtype: torch.dtype
    mixed: bool = False
    projection: Projection | None = None
    tf32: bool = False

    @property
    def precision_name(self) -> str:
        """As --precision calls it."""
        return "tf32" if self.tf32 else str(self.precision).removeprefix("torch.")

    @property
    def key(self) -> str:
        """The name of the folder of all units with these settings."""
        precision = "mixed" if self.mixed else self.precision_name
        storage_dtype = str(self.storage_dtype).removeprefix("torch.")
        projection = self.projection.key if self.projection else "exact"
        return f"{precision}-stored-{storage_dtype}-{projection}"

    def width(self, column: Shaped) -> int:
        """The number of numbers in one example's gradient of this column, if stored dense."""
        shape = column.shape
        return self.projection.width(shape) if self.projection else math.prod(shape)

    @property
    def rounding(self) -> float:
        """The allowed distance of two captures of one gradient, relative to the largest norm among
        the rows."""
        eps = TF32_EPS if self.tf32 else torch.finfo(self.precision).eps
        return max(4 * eps**0.5 if eps < 1e-6 else 8 * eps, 4 * STORE_EPS[self.storage_dtype])


def checkpoint_key(checkpoint: CheckpointFiles, memory: Path | None, compare: bool = False) -> str:
    """`step-N-<digest of its tensors>`; of an adapter also of the weights below it.

    `memory`: a JSON file that stores digests by path, size, both time stamps and inode. A file
    that replaces another one has another inode, and nobody can set the time of its last change.
    `compare`: read the files again, and raise CheckpointError where one differs from its digests.
    """
    known = read_json(memory) if memory and memory.is_file() else {}
    parts, fresh = [], False
    for file in checkpoint.files:
        state = describe_state(file)
        stored = known.get(state)
        digests = f"{digest_tensors(file)}-{digest_header(file)}" if compare else stored
        if not isinstance(stored, str) or "-" not in stored:  # one digest in older caches
            digests = f"{digest_tensors(file)}-{digest_header(file)}"
            known[state], fresh = digests, True
        elif digests != stored:
            raise CheckpointError(
                f"{file} is damaged: its content changed, and its time stamps did not",
                f"it differs from its digests in {memory}",
                "copy it again, or leave it out with --steps",
            )
        parts.append(known[state].partition("-")[0])
    if checkpoint.base:
        parts.append(checkpoint.base)
    if fresh and memory:
        with contextlib.suppress(OSError):  # a read-only cache works without it
            write_json(memory, known)
    return (
        f"step-{checkpoint.step:09d}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    )


def describe_state(file: Path) -> str:
    """What changes when a file is written or replaced."""
    state = file.stat()
    times = f"{state.st_mtime_ns}:{state.st_ctime_ns}"
    return f"{file.resolve()}:{state.st_size}:{times}:{state.st_ino}"


def check_rows_agree(
    stored: GradientRows, again: GradientRows, rounding: float, where: str, split: str, cache: Path
) -> None:
    """Raises CacheError, naming layer and example, where cached rows and the same rows captured
    again differ by more than rounding.

    Rounding is relative to the largest gradient among the rows, because the gradient of a well-fit
    example may be all rounding. So may that of a parameter (an attention key's bias): it may differ
    by a small part of the norm over all parameters.
    """
    remedy = "the run changed: --cache DIR starts another cache; or delete this one to recompute it"
    check_items_agree(stored, again.digests, split, cache)
    limit = rounding * again.losses.abs().max() + 1e-30
    differs = (stored.losses - again.losses).abs() > limit
    if differs.any():
        first = int(differs.nonzero()[0])
        raise CacheError(
            f"the cache {cache} belongs to another run: recomputed losses differ",
            f"first at example {int(stored.ids[first])} of {split}_data(), {where}: "
            f"{float(stored.losses[first]):.6g} cached, {float(again.losses[first]):.6g} now",
            remedy,
        )
    norm_of_all = float(sum(again.sqnorms.values(), torch.zeros(())).max().sqrt())
    for column, squares in again.sqnorms.items():
        norms, cached_norms = squares.sqrt(), stored.sqnorms[column].sqrt()
        allowed = max(rounding * float(norms.max()), rounding**1.5 * norm_of_all) + 1e-30
        distances = (cached_norms - norms).abs()
        if column in stored.forms:
            distances = distance(stored.forms[column], again.forms[column])
        wrong = (~(distances <= allowed)).nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            raise CacheError(
                f"the cache {cache} belongs to another run: recomputed gradients differ",
                f"first at {column}, example {int(stored.ids[first])} of {split}_data(), {where}",
                f"norm {float(cached_norms[first]):.6g} cached, {float(norms[first]):.6g} now, "
                f"distance {float(distances[first]):.3g}",
                remedy,
            )


def check_items_agree(stored: GradientRows, digests: torch.Tensor, split: str, cache: Path) -> None:
    """Raises CacheError, naming the first example, where the dataset's items are not those that
    the cached rows were computed from."""
    changed = (stored.digests != digests).nonzero().flatten().tolist()
    if changed:
        first = int(stored.ids[changed[0]])
        raise CacheError(
            f"the cache {cache} belongs to other data: example {first} of {split}_data() differs",
            f"compared {len(digests)} examples; {len(changed)} differ from the cached ones",
            "the data changed, or definition.py reads it in another way",
            "--cache DIR starts another cache; or delete this one to recompute it",
        )
