"""The interface of projections of one parameter.

Letters: N examples (n: some of them), K projected numbers, o x i the parameter as a matrix.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from influence_cli.gradients.deferred_forms import TiedForm
from influence_cli.gradients.forms import Factors, Form
from influence_cli.gradients.row_products import squares
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings


class ProjectionMap(ABC):
    """The projection of one parameter."""

    @abstractmethod
    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        """(N,) exact squared norms and (N, K) projected gradients."""


class FactoredMap(ProjectionMap):
    """A projection that reads factors and rows of an embedding without forming gradients."""

    @abstractmethod
    def factors(self, form: Factors) -> Tensor:
        """(N, K)."""

    @abstractmethod
    def rows(self, form: EmbeddingRows) -> Tensor:
        """(N, K)."""

    @abstractmethod
    def dense(self, part: Tensor) -> Tensor:
        """(n, o i) gradients -> (n, K)."""

    def project(self, form: Form) -> tuple[Tensor, Tensor]:
        if isinstance(form, TiedForm):
            return form.sqnorm(), self.factors(form.factors) + self.rows(form.rows)
        if isinstance(form, EmbeddingRows | Postings):
            return form.sqnorm(), self.rows(form.rows() if isinstance(form, Postings) else form)
        if isinstance(form, Factors) and not form.dense_is_cheaper:
            return form.sqnorm(), self.factors(form)
        parts = ((squares(part), self.dense(part)) for _, part in form.parts())
        norms, values = zip(*parts, strict=True)
        return torch.cat(norms), torch.cat(values)
