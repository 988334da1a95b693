"""Multiplies query gradients with the damped inverse of the curvature.

Letters: Q queries, D numbers of a parameter, T stored rows of an embedding of width d.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import GradientRows
from influence_cli.errors import GradientError
from influence_cli.gradients.forms import Dense, Form, Projected
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.preconditioners.block_maps import BlockMap
from influence_cli.preconditioners.blocks import Block
from influence_cli.preconditioners.fit import AUTO_DAMPING

ROUNDING = 1e-10  # of the mean eigenvalue: gradients of 1e-5 of the usual size


@dataclass(frozen=True)
class Preconditioner:
    """(H + damping)^{-1} of each block."""

    maps: Mapping[Block, BlockMap]
    damping: Mapping[Block, float]

    @classmethod
    def of(cls, maps: Mapping[Block, BlockMap], damping: float | None) -> "Preconditioner":
        """`damping`: None chooses 0.1 of each block's mean eigenvalue, and at least ROUNDING of
        the mean over all blocks: the inverse must not enlarge gradients that are rounding
        error, as those of an attention key's bias are.

        Raises GradientError where every training gradient is 0.
        """
        if damping is not None:
            return cls(maps, dict.fromkeys(maps, damping))
        means = {block: block_map.mean for block, block_map in maps.items()}
        overall = sum(means.values()) / max(1, len(means))
        if not overall:
            raise GradientError(
                "every training gradient is 0, so the curvature is 0",
                "--damping X gives a number to add to it",
            )
        least = ROUNDING * overall
        return cls(maps, {block: max(AUTO_DAMPING * mean, least) for block, mean in means.items()})

    def apply(self, rows: GradientRows) -> GradientRows:
        """The same rows with mapped gradients, and `sqnorms` of the gradients before."""
        forms: dict[str, Form] = {}
        for block in self.maps:
            parts = on_cpu(rows, block)
            forms |= block.split(self._map(block, block.join(parts)), parts)
        forms = {name: forms[name] for name in rows.forms}  # in their order
        return dataclasses.replace(rows, forms=forms, sqnorms=self.sqnorms(rows))

    def sqnorms(self, rows: GradientRows) -> dict[str, Tensor]:
        """(N,) float64 per parameter: g . (H + damping)^{-1} g. That of a weight is that of its
        block, and that of its bias 0.
        """
        sqnorms = {}
        for block, block_map in self.maps.items():
            values_N = block_map.sqnorms(block.join(on_cpu(rows, block)), self.damping[block])
            sqnorms[block.weight] = values_N
            if block.bias is not None:
                sqnorms[block.bias] = torch.zeros_like(values_N)
        return sqnorms

    def _map(self, block: Block, form: Form) -> Form:
        block_map, damping = self.maps[block], self.damping[block]
        if isinstance(form, EmbeddingRows) and block_map.left is None:
            return self._map_rows(form, block_map, damping)
        parts = [
            block_map.solve(values, damping).to(values.dtype) for _, values in form.parts()
        ]  # the next part overwrites the last one
        values_QD = torch.cat(parts) if parts else form.dense().values
        return (Projected if isinstance(form, Projected) else Dense)(form.shape, values_QD)

    def _map_rows(self, form: EmbeddingRows, block_map: BlockMap, damping: float) -> Form:
        """Few rows of a large matrix stay few rows: the map multiplies each by itself."""
        values_Td: Tensor = form.values.flatten(1).double()
        if block_map.right is not None:
            values_Td = values_Td @ block_map.right
        values_Td = values_Td / (block_map.eigenvalues[form.ids] + damping)
        if block_map.right is not None:
            values_Td = values_Td @ block_map.right.T
        values = values_Td.to(form.values.dtype).view_as(form.values)
        return EmbeddingRows(form.shape, form.ids, values, form.offsets)


def on_cpu(rows: GradientRows, block: Block) -> dict[str, Form]:
    cpu = torch.device("cpu")
    return {name: rows.forms[name].to(cpu) for name in block.columns}
