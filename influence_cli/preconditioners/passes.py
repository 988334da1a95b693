"""A pass over all training examples that sums statistics, and the files that keep the sums.

Each block has a file. A killed pass resumes from its last record.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from influence_cli.cache.id_blocks import Ids, cut_ids
from influence_cli.errors import CacheError
from influence_cli.extraction.drawn_labels import DrawnBatches
from influence_cli.extraction.extractor import Visited
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.preconditioners.blocks import Block
from influence_cli.preconditioners.kinds import CurvatureKind
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.storage.atomic import make_folders, report_disk_errors
from influence_cli.storage.checksums import checksum_metadata
from influence_cli.storage.safetensors_io import TensorFile, write_tensors

VERSION = 3  # of the files
RECORD_SECONDS = 30.0  # between two records of a pass
Kept = TypeVar("Kept")  # what a pass makes of the gradients of one block
Work = Callable[[Ids], Iterator[int]]  # adds these examples; yields how many, part by part
AddGradients = Callable[[str, Form], None]


@dataclass(frozen=True)
class Fit:
    """What is fitted where: the training gradients of these blocks at one checkpoint.

    `blocks`: by the names of their weights. `draws`: labels of the true Fisher matrix; None: the
    labels of the data.
    """

    source: GradientSource
    checkpoint: Checkpoint
    blocks: Mapping[str, Block]
    kind: CurvatureKind
    draws: DrawnBatches | None = None

    @property
    def columns(self) -> list[str]:
        return self.columns_of(self.blocks)

    def columns_of(self, names: Iterable[str]) -> list[str]:
        """Of the blocks of these names."""
        return [column for name in names for column in self.blocks[name].columns]

    @property
    def gradients(self) -> GradientSource:
        """Of the labels that are wanted. Those of drawn labels are not cached."""
        return self.source if self.draws is None else self.source.with_batches(self.draws)

    def check_losses(self, ids: Ids, losses: Tensor) -> None:
        if self.draws is not None:
            self.draws.check(ids, losses)

    @property
    def folder(self) -> Path | None:
        """Of the files; None without a cache."""
        labels = () if self.draws is None else ("true", self.draws.seed)
        return folder_of(self.source, self.checkpoint, (self.kind.basis, *labels))

    def path(self, names: Sequence[str], stage: str) -> Path | None:
        """Of the sums of these blocks."""
        folder = self.folder
        if folder is None:
            return None
        text = "\n".join(self.columns_of(names))
        return folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"


def folder_of(
    source: GradientSource, checkpoint: Checkpoint, kind: tuple[object, ...]
) -> Path | None:
    """The folder of what is fitted to all training examples at a checkpoint; None without a cache.
    It depends on the contents of all of them. `kind`: of these statistics.
    """
    cache = source.cache
    if cache is None:
        return None
    place = cache.folder("train", checkpoint).relative_to(cache.store.folder)
    run = source.run
    parts = VERSION, kind, place.as_posix(), run.definition.digest, run.train.digest_of_all
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
    return cache.store.folder / "preconditioners" / name


class Sums(Protocol):
    """The statistics of several blocks: `record` gives their tensors, by name, and
    `restore` takes them back.
    """

    def record(self) -> dict[str, dict[str, Tensor]]: ...

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None: ...


def run_pass(fit: Fit, names: Sequence[str], stage: str, sums: Sums, work: Work) -> None:
    """Adds up the statistics of all training examples, and keeps a record of them.

    A killed pass starts again at its last record, with the same sums.
    """
    count = len(fit.source.run.train)
    partial = fit.path(names, f"partial-{stage}")
    first = restore_partial(partial, sums)
    recorded = time.monotonic()
    with fit.source.reporter.progress(f"curvature, {stage}", count - first) as advance:
        for done in work(range(first, count)):
            first += done
            advance(done)
            if partial is not None and time.monotonic() - recorded > RECORD_SECONDS:
                write_partial(partial, sums.record(), first)
                recorded = time.monotonic()
    if partial is not None:
        partial.unlink(missing_ok=True)


def read_gradients(fit: Fit, names: Sequence[str], add: AddGradients) -> Work:
    """The gradients of these blocks, cached or computed, in the form in which the cache keeps
    them.
    """
    columns, cpu = fit.columns_of(names), torch.device("cpu")

    def work(ids: Ids) -> Iterator[int]:
        read = fit.gradients.prepare("train", [fit.checkpoint], columns, ids)
        for rows in read([(fit.checkpoint, ids)]):
            fit.check_losses(rows.ids, rows.losses)
            for name in names:
                forms = {column: rows.forms[column].to(cpu) for column in fit.blocks[name].columns}
                add(name, fit.blocks[name].join(forms))
            yield len(rows.ids)

    return work


def capture_gradients(
    fit: Fit,
    keep: Callable[[str, Form], Kept],
    add: Callable[[dict[str, Kept], int], bool],
) -> Work:
    """The same as layer rules compute them, before a sum over positions. `add` gets what `keep`
    made of the gradients of each parameter of a batch, and the number of its examples. It returns
    False to end the pass.
    """
    source, columns = fit.gradients, fit.columns

    def work(ids: Ids) -> Iterator[int]:
        for batch_ids in cut_ids(ids, source.budget.batch_size("train", columns)):
            parts: list[tuple[dict[str, Kept], int]] = []

            def take(visited: Visited[Kept], ids: Ids = batch_ids, parts: list = parts) -> None:
                at, losses, results = visited
                if not at.start:  # again in smaller cuts, after memory ran out
                    parts.clear()
                fit.check_losses(ids[at], losses)
                parts.append((results, len(losses)))

            source.extractor.visit_at(fit.checkpoint, "train", columns, batch_ids, keep, take)
            if not all(add(*part) for part in parts):
                return
            yield len(batch_ids)

    return work


def write_partial(path: Path, sums: dict[str, dict[str, Tensor]], first: int) -> None:
    named = {
        f"{name}/{key}": value for name, tensors in sums.items() for key, value in tensors.items()
    }
    write_sums(path, named | {"next": torch.tensor([first])})


def restore_partial(path: Path | None, sums: Sums) -> int:
    """The example from which the pass resumes."""
    if path is None or not path.is_file():
        return 0
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in read_sums(path).items():
        block, _, part = key.rpartition("/")
        by_name.setdefault(block, {})[part] = value
    first = int(by_name.pop("")["next"])
    for name, tensors in by_name.items():
        sums.restore(name, tensors)
    return first


def write_sums(path: Path, tensors: Mapping[str, Tensor]) -> None:
    root = path.parent.parent.parent
    make_folders(path.parent, root)
    with report_disk_errors(root):
        write_tensors(path, tensors, checksum_metadata(tensors))


def read_sums(path: Path) -> dict[str, Tensor]:
    """Raises CacheError for a damaged file."""
    try:
        with TensorFile(path) as content:
            return content.read_compared(content.entries)
    except (OSError, ValueError, KeyError) as error:
        raise CacheError(
            f"{path} is damaged: {error}", "delete it; the next command computes it again"
        ) from error
