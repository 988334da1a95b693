"""What a cached row depends on, and the comparison that refuses to reuse one that no longer holds."""

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from influence_cli.cache.quantize import STORE_EPS
from influence_cli.cache.store import GradientRows
from influence_cli.errors import CacheError
from influence_cli.gradients.form_ops import distance
from influence_cli.gradients.projection import Projection
from influence_cli.storage.atomic import read_json, write_json
from influence_cli.storage.checksums import digest_tensors


class CheckpointFiles(Protocol):
    """What the cache reads of a checkpoint."""

    @property
    def step(self) -> int: ...
    @property
    def files(self) -> tuple[Path, ...]: ...


class Shaped(Protocol):
    """What the cache reads of a column."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Settings:
    """How gradients are taken and kept: the dtype they are computed in, the one they are stored in, and their projection if any.

    `mixed`: the model has parameters of several dtypes and is used as it is; `precision` is then the widest.
    """

    precision: torch.dtype
    store: torch.dtype
    mixed: bool = False
    projection: Projection | None = None

    @property
    def key(self) -> str:
        """The name of the folder of all units taken and kept so."""
        precision, store = (
            str(dtype).removeprefix("torch.") for dtype in (self.precision, self.store)
        )
        kept = self.projection.key if self.projection else "exact"
        return f"{'mixed' if self.mixed else precision}-stored-{store}-{kept}"

    def width(self, column: Shaped) -> int:
        """The number of numbers in one example's gradient of this column, if stored dense."""
        shape = column.shape
        return self.projection.width(shape) if self.projection else math.prod(shape)

    @property
    def rounding(self) -> float:
        """How far two captures of one gradient may be apart, relative to the largest norm beside it."""
        eps = torch.finfo(self.precision).eps
        return max(4 * eps**0.5 if eps < 1e-6 else 8 * eps, 4 * STORE_EPS[self.store])


def checkpoint_key(checkpoint: CheckpointFiles, memory: Path | None) -> str:
    """`step-N-<digest of its tensors>`. `memory`: a json file that remembers digests by path, size and time of change."""
    known = read_json(memory) if memory and memory.is_file() else {}
    parts, fresh = [], False
    for file in checkpoint.files:
        state = file.stat()
        key = f"{file.resolve()}:{state.st_size}:{state.st_mtime_ns}"
        if key not in known:
            known[key], fresh = digest_tensors(file), True
        parts.append(known[key])
    if fresh and memory:
        with contextlib.suppress(
            OSError
        ):  # a read-only cache serves all the same; digests are then taken again
            write_json(memory, known)
    return (
        f"step-{checkpoint.step:09d}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]}"
    )


def compare(
    stored: GradientRows, again: GradientRows, rounding: float, where: str, split: str, cache: Path
) -> None:
    """Raise CacheError, naming layer and example, where cached rows and the same rows captured again differ beyond rounding.

    Rounding is relative to the largest gradient among the rows: a well-fit example's own gradient may be all rounding; so may a parameter's
    (an attention key's bias), to which a little of the whole gradient's is allowed.
    """
    remedy = "the run changed since they were cached; --cache DIR starts another cache, deleting the old one starts afresh"
    compare_data(stored, again.digests, split, cache)
    apart = (stored.losses - again.losses).abs() > rounding * again.losses.abs().max() + 1e-30
    if apart.any():
        first = int(apart.nonzero()[0])
        raise CacheError(
            f"the cache {cache} belongs to another run: losses taken again differ",
            f"first at example {int(stored.ids[first])} of {split}_data(), {where}: "
            f"{float(stored.losses[first]):.6g} cached, {float(again.losses[first]):.6g} now",
            remedy,
        )
    whole = float(sum(again.sqnorms.values(), torch.zeros(())).max().sqrt())
    for column, squares in again.sqnorms.items():
        norms, kept = squares.sqrt(), stored.sqnorms[column].sqrt()
        allowed = max(rounding * float(norms.max()), rounding**1.5 * whole) + 1e-30
        off = (kept - norms).abs()
        if column in stored.forms:
            off = distance(stored.forms[column], again.forms[column])
        wrong = (~(off <= allowed)).nonzero().flatten().tolist()
        if wrong:
            first = wrong[0]
            raise CacheError(
                f"the cache {cache} belongs to another run: gradients taken again differ",
                f"first at {column}, example {int(stored.ids[first])} of {split}_data(), {where}",
                f"norm {float(kept[first]):.6g} cached, {float(norms[first]):.6g} now, distance {float(off[first]):.3g}",
                remedy,
            )


def compare_data(stored: GradientRows, digests: torch.Tensor, split: str, cache: Path) -> None:
    """Raise CacheError, naming the first example, where the items behind cached rows are not the dataset's items now."""
    changed = (stored.digests != digests).nonzero().flatten().tolist()
    if changed:
        first = int(stored.ids[changed[0]])
        raise CacheError(
            f"the cache {cache} belongs to other data: example {first} of {split}_data() is not the one that was cached",
            f"compared {len(digests)} examples, {len(changed)} differ",
            "--cache DIR starts another cache; deleting the old one starts afresh",
        )
