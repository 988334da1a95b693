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
from influence_cli.preconditioners.fit import AUTO_DAMPING

ROUNDING = 1e-10  # of the mean eigenvalue: gradients of 1e-5 of the usual size


@dataclass(frozen=True)
class Preconditioner:
    """(H + damping)^{-1} of each parameter."""

    maps: Mapping[str, BlockMap]
    damping: Mapping[str, float]

    @classmethod
    def of(cls, maps: Mapping[str, BlockMap], damping: float | None) -> "Preconditioner":
        """`damping`: None chooses 0.1 of each parameter's mean eigenvalue, and at least ROUNDING of
        the mean over all parameters: the inverse must not enlarge gradients that are rounding
        error, as those of an attention key's bias are.

        Raises GradientError where every training gradient is 0.
        """
        if damping is not None:
            return cls(maps, dict.fromkeys(maps, damping))
        means = {name: block.mean for name, block in maps.items()}
        overall = sum(means.values()) / max(1, len(means))
        if not overall:
            raise GradientError(
                "every training gradient is 0, so the curvature is 0",
                "--damping X gives a number to add to it",
            )
        least = ROUNDING * overall
        return cls(maps, {name: max(AUTO_DAMPING * mean, least) for name, mean in means.items()})

    def apply(self, rows: GradientRows) -> GradientRows:
        """The same rows with mapped gradients, and `sqnorms` of the gradients before."""
        cpu = torch.device("cpu")
        forms = {name: self._map(name, form.to(cpu)) for name, form in rows.forms.items()}
        return dataclasses.replace(rows, forms=forms, sqnorms=self.sqnorms(rows))

    def sqnorms(self, rows: GradientRows) -> dict[str, Tensor]:
        """(N,) float64 per parameter: g . (H + damping)^{-1} g."""
        cpu = torch.device("cpu")
        return {
            name: self.maps[name].sqnorms(form.to(cpu), self.damping[name])
            for name, form in rows.forms.items()
        }

    def _map(self, name: str, form: Form) -> Form:
        block, damping = self.maps[name], self.damping[name]
        if isinstance(form, EmbeddingRows) and block.left is None:
            return self._map_rows(form, block, damping)
        parts = [
            block.solve(values, damping).to(values.dtype) for _, values in form.parts()
        ]  # the next part overwrites the last one
        values_QD = torch.cat(parts) if parts else form.dense().values
        return (Projected if isinstance(form, Projected) else Dense)(form.shape, values_QD)

    def _map_rows(self, form: EmbeddingRows, block: BlockMap, damping: float) -> Form:
        """Few rows of a large matrix stay few rows: the map multiplies each by itself."""
        values_Td: Tensor = form.values.flatten(1).double()
        if block.right is not None:
            values_Td = values_Td @ block.right
        values_Td = values_Td / (block.eigenvalues[form.ids] + damping)
        if block.right is not None:
            values_Td = values_Td @ block.right.T
        values = values_Td.to(form.values.dtype).view_as(form.values)
        return EmbeddingRows(form.shape, form.ids, values, form.offsets)
