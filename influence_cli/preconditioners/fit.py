"""Fits the curvature of each parameter to the training gradients at one checkpoint.

One pass sums the statistics; ekfac measures its eigenvalues in a second one. With a cache both are
kept, each as one file per parameter, and a killed pass resumes from its last record.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from influence_cli.errors import CacheError, listed
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.preconditioners.block_maps import BlockMap, map_of_moments
from influence_cli.preconditioners.block_statistics import BlockDiagonal, BlockMoments
from influence_cli.preconditioners.kinds import KINDS, CurvatureKind
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.storage.atomic import make_folders, report_disk_errors
from influence_cli.storage.checksums import checksum_metadata
from influence_cli.storage.safetensors_io import TensorFile, write_tensors

VERSION = 1  # of the files
RECORD_SECONDS = 30.0  # between two records of a pass
AUTO_DAMPING = 0.1  # of the mean eigenvalue of a parameter, as kronfluence has it


@dataclass(frozen=True)
class Fit:
    """What is fitted where: the training gradients of these columns at one checkpoint."""

    source: GradientSource
    checkpoint: Checkpoint
    columns: Sequence[str]
    kind: CurvatureKind

    @property
    def folder(self) -> Path | None:
        """Of the files; None without a cache."""
        cache = self.source.cache
        if cache is None:
            return None
        place = cache.folder("train", self.checkpoint).relative_to(cache.store.folder)
        parts = (VERSION, self.kind.basis, place.as_posix(), self.source.run.definition.digest)
        text = repr((*parts, len(self.source.run.train)))
        return (
            cache.store.folder / "preconditioners" / hashlib.sha256(text.encode()).hexdigest()[:16]
        )

    def path(self, column: str, stage: str) -> Path | None:
        folder = self.folder
        if folder is None:
            return None
        return folder / f"{stage}-{hashlib.sha256(column.encode()).hexdigest()[:16]}.safetensors"


def fit_maps(
    source: GradientSource, checkpoint: Checkpoint, columns: Sequence[str], kind: str
) -> dict[str, BlockMap]:
    """The curvature of each column, over all training examples."""
    fit = Fit(source, checkpoint, columns, KINDS[kind])
    moments = load_moments(fit)
    missing = [name for name in columns if name not in moments]
    if missing:
        moments |= sum_moments(fit, missing)
    maps = {name: map_of_moments(moments[name]) for name in columns}
    note_other_bases(fit, moments)
    if not fit.kind.is_corrected:
        return maps
    return correct_eigenvalues(fit, moments, maps)


def note_other_bases(fit: Fit, moments: Mapping[str, BlockMoments]) -> None:
    """Name the parameters that another approximation takes. Vectors have their full matrix in
    every kind.
    """
    others: dict[str, list[str]] = {}
    for name, sums in moments.items():
        if sums.basis not in (fit.kind.basis, "full"):
            others.setdefault(sums.basis, []).append(name)
        if 1 in (sums.left.dim(), sums.right.dim()):
            others.setdefault("diagonal", []).append(name)
    texts = {"moments": "use the approximation shampoo: their gradients are stored without factors"}
    texts["diagonal"] = "have a diagonal for their tokens, or for a side of more than 4,096 rows"
    for basis, names in others.items():
        count = f"{len(names):,} of {len(moments):,} parameters"
        fit.source.reporter.note(f"curvature: {count} {texts[basis]}: {listed(names, 3)}")


# ---------------------------------------------------------------- the first pass
def load_moments(fit: Fit) -> dict[str, BlockMoments]:
    """The statistics that an earlier command stored."""
    stored = {}
    for name in fit.columns:
        path = fit.path(name, "moments")
        if path is not None and path.is_file():
            stored[name] = read_moments(fit, read_sums(path))
    return stored


def read_moments(fit: Fit, tensors: Mapping[str, Tensor]) -> BlockMoments:
    examples, positions, rows, columns, basis = tensors["counts"].tolist()
    names = ("full", "moments", "factors")
    return BlockMoments(
        names[basis],  # type: ignore[arg-type]  # one of three literals
        (rows, columns),
        tensors["left"],
        tensors["right"],
        examples,
        positions,
    )


def write_moments(moments: BlockMoments) -> dict[str, Tensor]:
    basis = ("full", "moments", "factors").index(moments.basis)
    tensors = moments.tensors()
    counts = torch.cat([tensors["counts"], torch.tensor([basis])])
    return {**tensors, "counts": counts}


def sum_moments(fit: Fit, columns: Sequence[str]) -> dict[str, BlockMoments]:
    """One pass over the training gradients."""
    sums: dict[str, BlockMoments] = {}

    def add(name: str, form: Form) -> None:
        if name not in sums:
            sums[name] = BlockMoments.start(form, fit.kind.basis)
        sums[name].add(form)

    def record() -> dict[str, dict[str, Tensor]]:
        return {name: write_moments(total) for name, total in sums.items()}

    def restore(name: str, tensors: Mapping[str, Tensor]) -> None:
        sums[name] = read_moments(fit, tensors)

    run_pass(fit, columns, "moments", add, record, restore)
    return sums


# ---------------------------------------------------------------- the second pass
def correct_eigenvalues(
    fit: Fit, moments: Mapping[str, BlockMoments], maps: Mapping[str, BlockMap]
) -> dict[str, BlockMap]:
    """The maps with the exact diagonal of the curvature in their basis of eigenvectors."""
    sums = {
        name: BlockDiagonal(maps[name].left, maps[name].right, maps[name].shape)
        for name in fit.columns
        if moments[name].basis != "full"
    }
    for name in list(sums):
        path = fit.path(name, "diagonal")
        if path is not None and path.is_file():
            restore_diagonal(sums[name], read_sums(path))
    missing = [name for name, total in sums.items() if not total.examples]

    def record() -> dict[str, dict[str, Tensor]]:
        return {name: write_diagonal(sums[name]) for name in missing}

    if missing:
        run_pass(
            fit,
            missing,
            "diagonal",
            lambda name, form: sums[name].add(form),
            record,
            lambda name, tensors: restore_diagonal(sums[name], tensors),
        )
    corrected = {
        name: BlockMap(maps[name].left, maps[name].right, total.total / max(1, total.examples))
        for name, total in sums.items()
    }
    return {name: corrected.get(name, maps[name]) for name in fit.columns}


def write_diagonal(total: BlockDiagonal) -> dict[str, Tensor]:
    return {"total": total.total, "examples": torch.tensor([total.examples])}


def restore_diagonal(total: BlockDiagonal, tensors: Mapping[str, Tensor]) -> None:
    total.total, total.examples = tensors["total"], int(tensors["examples"])


# ---------------------------------------------------------------- a pass
def run_pass(
    fit: Fit,
    columns: Sequence[str],
    stage: str,
    add: Callable[[str, Form], None],
    record: Callable[[], dict[str, dict[str, Tensor]]],
    restore: Callable[[str, Mapping[str, Tensor]], None],
) -> None:
    """Gives the gradients of all training examples to `add`, and keeps what `record` returns.

    A killed pass starts again at its last record, with the same sums.
    """
    source, count = fit.source, len(fit.source.run.train)
    partial = fit.path("\n".join(columns), f"partial-{stage}")
    first = restore_partial(partial, restore)
    ids = range(first, count)
    read = source.prepare("train", [fit.checkpoint], columns, ids)
    recorded = time.monotonic()
    with source.reporter.progress(f"curvature, {stage}", len(ids)) as advance:
        for rows in read([(fit.checkpoint, ids)]):
            for name in columns:
                add(name, rows.forms[name].to(torch.device("cpu")))
            first += len(rows.ids)
            advance(len(rows.ids))
            if partial is not None and time.monotonic() - recorded > RECORD_SECONDS:
                write_partial(partial, record(), first)
                recorded = time.monotonic()
    if partial is not None:
        for name, tensors in record().items():
            path = fit.path(name, stage)
            assert path is not None
            write_sums(path, tensors)
        partial.unlink(missing_ok=True)


def write_partial(path: Path, sums: dict[str, dict[str, Tensor]], first: int) -> None:
    named = {
        f"{name}/{key}": value for name, tensors in sums.items() for key, value in tensors.items()
    }
    write_sums(path, named | {"next": torch.tensor([first])})


def restore_partial(path: Path | None, restore: Callable[[str, Mapping[str, Tensor]], None]) -> int:
    """The example from which the pass resumes."""
    if path is None or not path.is_file():
        return 0
    tensors = read_sums(path)
    by_name: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, part = key.rpartition("/")
        by_name.setdefault(name, {})[part] = value
    first = int(by_name.pop("")["next"])
    for column, sums in by_name.items():
        restore(column, sums)
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
