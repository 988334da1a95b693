"""Which words count in TracIn-WE, what they are called, and which are near each other.

Letters: T rows (the distinct words of each text), U tokens, V vocabulary, K synonyms.
"""

import re
from functools import cached_property

import torch
from torch import Tensor, nn

from influence_cli.errors import UsageProblem
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.sparse_forms import Postings
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.token_texts import TokenTexts
from influence_cli.methods.tracin_we import TracinWeOptions

# [CLS], <s>, <|endoftext|>; not the byte tokens <0x0A>
SPECIAL = re.compile(r"\[[^\[\]\s]+\]|<(?!0x)[^<>\s]+>")


class WordSelector:
    """Selects the rows of an embedding's gradient that count, by the options of TracIn-WE."""

    def __init__(
        self, source: GradientSource, request: ScoreRequest, options: TracinWeOptions
    ) -> None:
        """Raises UsageProblem for options that do not fit the vocabulary or the definition."""
        self.source, self.request, self.options = source, request, options
        (self.column,) = request.columns
        self.vocabulary = request.columns[self.column].shape[0]
        self._texts = TokenTexts(source.run.definition)
        pad = options.pad_id
        if pad is not None and not 0 <= pad < self.vocabulary:
            raise UsageProblem(
                f"--pad-id {pad}: no such token",
                f"expected: a token id from 0 to {self.vocabulary - 1:,}",
            )
        if options.special_tokens != "keep" and not source.run.definition.has("token"):
            raise UsageProblem(
                f"--special-tokens {options.special_tokens}: definition.py has no token(id), "
                "which says which tokens are special",
                "expected: token(id) returns texts like [CLS], <s> or <|endoftext|> for them",
            )

    def text(self, token: int) -> str:
        """The text of a token, or its id where the definition has no `token`."""
        return self._texts.of(token)

    def counts(self, tokens: Tensor) -> Tensor:
        """(U,) mask of the tokens that count."""
        mask = torch.ones(len(tokens), dtype=torch.bool)
        if self.options.pad_id is not None:
            mask &= tokens != self.options.pad_id
        if self.options.special_tokens != "keep":
            special = torch.tensor(
                [SPECIAL.fullmatch(self.text(token)) is not None for token in tokens.tolist()],
                dtype=torch.bool,
            )
            mask &= special if self.options.special_tokens == "only" else ~special
        return mask

    def select(self, form: object, query: bool = False) -> Postings:
        """The rows that count.

        A training word that no query has meets no row. So words are left out of the queries
        alone, unless training words are ranked or their norms are needed.
        """
        assert isinstance(form, Postings)
        if query or self.options.top_words or self.request.normalize:
            mask = self.counts(form.tokens)
            form = form.select(torch.repeat_interleave(mask, form.starts.diff()))
        if self.options.top_words:
            form = form.select(strongest_rows(form, self.options.top_words))
        return form

    def with_synonyms(self, postings: Postings, words: Tensor) -> tuple[Postings, Tensor]:
        """Each row also under the tokens near its word, times their cosine (section 4.3).

        Returns the rows by token, and of each row the query's own word (T,).
        """
        near, likeness = self._nearest(postings.tokens)
        token_of_row = torch.repeat_interleave(
            torch.arange(len(postings.tokens)), postings.starts.diff()
        )
        rows = torch.arange(len(words)).repeat_interleave(near.shape[1])
        tokens = near[token_of_row].flatten()
        factors = likeness[token_of_row].flatten()
        positive = factors > 0
        rows, tokens, factors = rows[positive], tokens[positive], factors[positive]
        order = torch.argsort(tokens, stable=True)
        rows, tokens, factors = rows[order], tokens[order], factors[order]
        distinct, counts = torch.unique_consecutive(tokens, return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = postings.values[rows] * factors[:, None].to(postings.values.dtype)
        example = postings.example[rows]
        per_example = torch.bincount(example, minlength=len(postings))
        shape = postings.shape
        return Postings(shape, distinct, starts, example, values, per_example), words[rows]

    def _nearest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(U, 1 + K) each token and the K nearest that count, and their cosines.

        Cosines are between embedding vectors at the last checkpoint.
        """
        unit = self._unit_vectors
        cosines = unit[tokens] @ unit.T  # (U, V)
        cosines[:, ~self._countable] = -1
        cosines[torch.arange(len(tokens)), tokens] = -1
        likeness, near = cosines.topk(min(self.options.synonyms, len(unit) - 1), dim=1)
        ones = torch.ones(len(tokens), 1)
        return torch.cat([tokens[:, None], near], 1), torch.cat([ones, likeness.float()], 1)

    @cached_property
    def _unit_vectors(self) -> Tensor:
        name = self.request.columns[self.column].module or ""
        module = self.source.run.model.at(self.request.checkpoints[-1]).get_submodule(name)
        assert isinstance(module, nn.Embedding)
        weight = module.weight.detach().float().cpu()
        return weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)

    @cached_property
    def _countable(self) -> Tensor:
        return self.counts(torch.arange(self.vocabulary))


def strongest_rows(form: Postings, count: int) -> Tensor:
    """(T,) mask: the `count` rows of largest norm of each example; equal ones by token."""
    norms = form.values.double().norm(dim=1)
    by_norm = torch.argsort(-norms, stable=True)
    order = by_norm[torch.argsort(form.example[by_norm], stable=True)]
    starts = torch.cat([form.counts.new_zeros(1), form.counts.cumsum(0)])[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[form.example[order]]
    return rank < count
