"""Fits the curvature of each block to the training gradients at one checkpoint.

One pass sums the statistics; ekfac measures its eigenvalues in a second one. Where the cache keeps
no factors of a layer, kfac and ekfac take its inputs and output gradients from a pass of their own.
Without a cache, that pass is the first and usually the only one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from influence_cli.errors import listed
from influence_cli.extraction.drawn_labels import DrawnBatches
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.forms import Form
from influence_cli.preconditioners.block_maps import BlockMap, map_of_moments
from influence_cli.preconditioners.block_statistics import (
    BlockDiagonal,
    BlockMoments,
    PositionSums,
    choose_basis,
)
from influence_cli.preconditioners.blocks import Block, join_biases
from influence_cli.preconditioners.kinds import KINDS, Basis
from influence_cli.preconditioners.passes import (
    Fit,
    Sums,
    capture_gradients,
    read_gradients,
    read_sums,
    run_pass,
    write_sums,
)
from influence_cli.run.checkpoints import Checkpoint

AUTO_DAMPING = 0.1  # of the mean eigenvalue of a block, as kronfluence has it


def fit_maps(
    source: GradientSource,
    checkpoint: Checkpoint,
    columns: Sequence[str],
    kind: str,
    draws: DrawnBatches | None = None,
) -> dict[Block, BlockMap]:
    """The curvature of each block of these columns, over all training examples. `draws`: see
    Fit.
    """
    fit = Fit(source, checkpoint, list_blocks(source, columns, kind), KINDS[kind], draws)
    moments = load_moments(fit)
    missing = [name for name in fit.blocks if name not in moments]
    if missing:
        moments |= sum_moments(fit, missing)
    maps = {name: map_of_moments(moments[name]) for name in fit.blocks}
    note_other_bases(fit, moments)
    if fit.kind.is_corrected:
        maps = correct_eigenvalues(fit, moments, maps)
    return {block: maps[name] for name, block in fit.blocks.items()}


def list_blocks(source: GradientSource, columns: Sequence[str], kind: str) -> dict[str, Block]:
    """The blocks of these columns, by name. Full matrices and projections are of one parameter."""
    if KINDS[kind].basis == "full" or source.settings.projection is not None:
        return {name: Block(name) for name in columns}
    return join_biases(source.run.model.module, source.run.columns, columns)


def note_other_bases(fit: Fit, moments: Mapping[str, BlockMoments]) -> None:
    """Name the parameters that another approximation takes. Vectors have their full matrix in
    every kind.
    """
    others: dict[str, list[str]] = {}
    for name, sums in moments.items():
        columns = fit.blocks[name].columns
        if sums.basis not in (fit.kind.basis, "full"):
            others.setdefault(sums.basis, []).extend(columns)
        if 1 in (sums.left.dim(), sums.right.dim()):
            others.setdefault("diagonal", []).extend(columns)
    texts = {
        "moments": "use the approximation shampoo: no layer rule gives inputs and output gradients"
    }
    texts["diagonal"] = "have a diagonal for their tokens, or for a side of more than 4,096 rows"
    for basis, names in others.items():
        count = f"{len(names):,} of {len(fit.columns):,} parameters"
        fit.source.reporter.note(f"curvature: {count} {texts[basis]}: {listed(names, 3)}")


# ---------------------------------------------------------------- the first pass
BASES: tuple[Basis, ...] = ("full", "moments", "factors")  # by the number in a file


@dataclass
class MomentSums:
    """The sums of a pass. `dropped`: blocks whose gradients do not have the wanted basis."""

    sums: dict[str, BlockMoments] = field(default_factory=dict)
    dropped: set[str] = field(default_factory=set)

    def record(self) -> dict[str, dict[str, Tensor]]:
        records = {name: write_moments(total) for name, total in self.sums.items()}
        return records | {name: {"dropped": torch.ones(1)} for name in self.dropped}

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if "dropped" in tensors:
            self.dropped.add(name)
        else:
            self.sums[name] = read_moments(tensors)

    def drop(self, name: str) -> None:
        self.dropped.add(name)
        self.sums.pop(name, None)


def load_moments(fit: Fit) -> dict[str, BlockMoments]:
    """The statistics that an earlier command stored."""
    stored = {}
    for name in fit.blocks:
        path = fit.path([name], "moments")
        if path is not None and path.is_file():
            stored[name] = read_moments(read_sums(path))
    return stored


def read_moments(tensors: Mapping[str, Tensor]) -> BlockMoments:
    examples, positions, rows, columns, basis = tensors["counts"].tolist()
    shape = rows, columns
    return BlockMoments(BASES[basis], shape, tensors["left"], tensors["right"], examples, positions)


def write_moments(moments: BlockMoments) -> dict[str, Tensor]:
    tensors = moments.tensors()
    counts = torch.cat([tensors["counts"], torch.tensor([BASES.index(moments.basis)])])
    return {**tensors, "counts": counts}


def sum_moments(fit: Fit, names: Sequence[str]) -> dict[str, BlockMoments]:
    """The sums of the first pass, for kfac and ekfac of up to three: over gradients as the cache
    keeps them; over the positions of layers that have a rule and are stored without them; over the
    gradients of the rest. Without a cache, the second of them is the first, and sums all that it
    can.
    """
    wanted = {name: wanted_basis(fit, name) for name in names}
    sums: dict[str, BlockMoments] = {}
    if fit.kind.basis == "factors" and fit.gradients.cache is None:
        sums = sum_captured(fit, wanted)
    else:
        sums = sum_stored(fit, wanted)
        missing = [name for name in names if name not in sums]
        if missing:
            ways = fit.source.extractor.captures.ways("train", fit.columns)
            sums |= sum_captured(fit, {n: "factors" for n in missing if ways[n] == "rule"})
    rest: dict[str, Basis] = {
        name: "moments" if basis == "factors" else basis
        for name, basis in wanted.items()
        if name not in sums
    }
    return sums | (sum_stored(fit, rest) if rest else {})


def wanted_basis(fit: Fit, name: str) -> Basis:
    """Factors only of a matrix that is no embedding, and is not projected."""
    column, basis = fit.source.run.columns[name], fit.kind.basis
    is_matrix = len(column.shape) > 1 and not column.embedding
    can_have_factors = is_matrix and fit.source.settings.projection is None
    return "moments" if basis == "factors" and not can_have_factors else basis


def sum_stored(fit: Fit, wanted: Mapping[str, Basis]) -> dict[str, BlockMoments]:
    """One pass over the gradients as the cache keeps them. It leaves blocks out that should
    have factors, and are stored without them in any unit.
    """
    totals = MomentSums()

    def add(name: str, form: Form) -> None:
        if name in totals.dropped:
            return
        if wanted[name] == "factors" and choose_basis(form, "factors") == "moments":
            totals.drop(name)
            return
        if name not in totals.sums:
            totals.sums[name] = BlockMoments.start(form, wanted[name])
        totals.sums[name].add(form)

    names = list(wanted)
    run_pass(fit, names, "moments", totals, read_gradients(fit, names, add))
    store_sums(fit, "moments", totals)
    return totals.sums


def sum_captured(fit: Fit, wanted: Mapping[str, Basis]) -> dict[str, BlockMoments]:
    """One pass that runs the model and keeps no gradients. It leaves blocks out whose positions are
    not known in any batch, and those of two parameters that need none.
    """
    totals, names = MomentSums(), set(wanted)

    def keep(name: str, form: Form) -> BlockMoments | None:
        if name not in names - totals.dropped:
            return None
        block = fit.blocks[name]
        if wanted[name] == "factors":
            axis = None if block.bias is None else block.axis
            sums = PositionSums.of(form, axis)
            return None if sums is None else BlockMoments.of_positions(sums, len(form))
        if block.bias is not None:
            return None
        moments = BlockMoments.start(form, wanted[name])
        moments.add(form.to(torch.device("cpu")))
        return moments

    def add(moments_of: dict[str, BlockMoments | None], examples: int) -> bool:
        for name in names - totals.dropped:
            if (moments := moments_of[name]) is None:
                totals.drop(name)
            elif name in totals.sums:
                totals.sums[name].merge(moments)
            else:
                totals.sums[name] = moments
        return totals.dropped != names

    if wanted:
        run_pass(fit, list(wanted), "positions", totals, capture_gradients(fit, keep, add))
        store_sums(fit, "moments", totals)
    return totals.sums


def store_sums(fit: Fit, stage: str, totals: Sums) -> None:
    """One file for each block, where there is a cache."""
    for name, tensors in totals.record().items():
        path = fit.path([name], stage)
        if path is not None and "dropped" not in tensors:
            write_sums(path, tensors)


# ---------------------------------------------------------------- the second pass
@dataclass
class DiagonalSums:
    """The squares along the eigenvectors of each block."""

    sums: dict[str, BlockDiagonal]

    def record(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {"total": total.total, "examples": torch.tensor([total.examples])}
            for name, total in self.sums.items()
        }

    def restore(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        total = self.sums[name]
        total.total, total.examples = tensors["total"], int(tensors["examples"])

    def add(self, name: str, form: Form) -> None:
        self.sums[name].add(form)


def correct_eigenvalues(
    fit: Fit, moments: Mapping[str, BlockMoments], maps: Mapping[str, BlockMap]
) -> dict[str, BlockMap]:
    """The maps with the exact diagonal of the curvature in their basis of eigenvectors."""
    totals = DiagonalSums(
        {
            name: BlockDiagonal(maps[name].left, maps[name].right, maps[name].shape)
            for name in fit.blocks
            if moments[name].basis != "full"
        }
    )
    for name in totals.sums:
        path = fit.path([name], "diagonal")
        if path is not None and path.is_file():
            totals.restore(name, read_sums(path))
    missing = {name: total for name, total in totals.sums.items() if not total.examples}
    if missing:
        some = DiagonalSums(missing)
        work = read_gradients(fit, list(missing), some.add)
        run_pass(fit, list(missing), "diagonal", some, work)
        store_sums(fit, "diagonal", some)
    corrected = {
        name: BlockMap(maps[name].left, maps[name].right, total.total / max(1, total.examples))
        for name, total in totals.sums.items()
    }
    return {name: corrected.get(name, maps[name]) for name in fit.blocks}
