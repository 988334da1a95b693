"""TracIn-WE (Yeh et al. 2022, arXiv:2202.11844): influence through word embeddings, down to the word.

score(x, q) = sum over checkpoints i of eta_i sum over words w of both texts of G_w,i(x) . G_w,i(q), where G_w(x) is the sum over the
positions of w of dl/de (equation 7; section 4). Score > 0: proponent. The inner terms are the scores of words; they sum to the score.
Padding never counts. With synonyms, S(w, w') G_w(x) . G_w'(q) for words w near the query's w' (section 4.3).

T rows (a text's distinct words), U tokens, V vocabulary, d numbers of an embedding, N train, Q query.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.cache.gradient_rows import concat_rows
from influence_cli.cache.id_blocks import Ids
from influence_cli.errors import DefinitionError, UsageProblem
from influence_cli.extraction.source import GradientSource
from influence_cli.gradients.sparse_forms import EmbeddingRows, Postings
from influence_cli.methods.declaration import WordOptions
from influence_cli.methods.pairwise import Advance, RankingFactory, Units, of_next, ranked
from influence_cli.methods.request import ScoredQueries, ScoreRequest
from influence_cli.output.ranking import Entry, Ranking, TopRanking
from influence_cli.run.checkpoints import Checkpoint

SPECIAL = re.compile(
    r"\[[^\[\]\s]+\]|<(?!0x)[^<>\s]+>"
)  # [CLS], <s>, <|endoftext|>; not the byte tokens <0x0A>


def score(
    gradients: GradientSource, question: ScoreRequest, new_ranking: RankingFactory
) -> Iterator[ScoredQueries]:
    """Scores of every training example asked for, ranked per query; with `by="word"` the answer splits ranked pairs into words."""
    (name,) = question.columns
    words = WordSelector(gradients, question)
    size = gradients.budget.sizes("query", [name]).example_bytes([name]) * max(
        1, 4 // gradients.settings.store.itemsize
    )

    def load(ids: Ids) -> list[WordQueries]:
        return [words.asked(checkpoint, ids) for checkpoint in question.checkpoints]

    def scores(
        queries: list[WordQueries], ids: np.ndarray, units: Units, advance: Advance
    ) -> np.ndarray:
        totals = torch.zeros(
            1 + len(question.parts), len(ids), len(queries[0].postings), dtype=torch.float64
        )
        for k, weight in enumerate(question.weights):
            done = 0
            for rows in of_next(units, len(ids)):
                at = slice(done, done + len(rows.ids))
                done = at.stop
                found = words.products(words.kept(rows.forms[name]), queries[k]) * weight.of(
                    question.columns[name].names
                )
                totals[0, at] += found
                if question.by == "checkpoint":
                    totals[1 + k, at] += found
                advance(len(rows.ids), f"checkpoint {k + 1} of {len(question.checkpoints)}")
        return totals.transpose(1, 2).contiguous().numpy()

    for ids, queries, ranking in ranked(
        gradients, question, new_ranking, max(1, size) * (1 + words.options.synonyms), load, scores
    ):
        split = Split(words, queries, ranking) if question.by == "word" else None
        yield ScoredQueries(
            None if question.sum_queries else [int(i) for i in ids], ranking, question.parts, split
        )


@dataclass(frozen=True)
class WordQueries:
    """The queries at one checkpoint: their rows by token; of each row the query's own word (another one where synonyms are asked for)."""

    postings: Postings
    word: Tensor  # (T,)
    norms: Tensor  # (Q,)

    def rows_of(self, query: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, own words and gradients of one query's rows."""
        tokens = torch.repeat_interleave(self.postings.tokens, self.postings.starts.diff())
        mine = self.postings.example == query
        return tokens[mine], self.word[mine], self.postings.values[mine].double()


class WordSelector:
    """Which words count, what they are called, and which are near each other."""

    def __init__(self, gradients: GradientSource, question: ScoreRequest) -> None:
        self.gradients, self.question = gradients, question
        self.options = question.words or WordOptions()
        (self.name,) = question.columns
        self.tokens = question.columns[self.name].shape[0]
        self._texts: dict[int, str] = {}
        pad = self.options.pad_id
        if pad is not None and not 0 <= pad < self.tokens:
            raise UsageProblem(
                f"--pad-id {pad}: no such token",
                f"expected: a token id from 0 to {self.tokens - 1:,}",
            )
        if self.options.special != "keep" and not gradients.run.definition.has("token"):
            raise UsageProblem(
                f"--special-tokens {self.options.special}: definition.py has no token(id) that says which tokens are special",
                "expected: token(id) gives texts like [CLS], <s> or <|endoftext|> for them",
            )

    def text(self, token: int) -> str:
        """The text of a token, or its id where the definition has no `token`. Raises DefinitionError where that gives no text."""
        if token not in self._texts:
            definition = self.gradients.run.definition
            value = definition.call("token", token) if definition.has("token") else str(token)
            if not isinstance(value, str):
                raise DefinitionError(
                    f"token({token}) returned a {type(value).__name__}",
                    "expected: the token's text",
                )
            self._texts[token] = value
        return self._texts[token]

    # ------------------------------------------------------------ which count
    def counts(self, tokens: Tensor) -> Tensor:
        """(U,) which of these tokens count."""
        kept = torch.ones(len(tokens), dtype=torch.bool)
        if self.options.pad_id is not None:
            kept &= tokens != self.options.pad_id
        if self.options.special != "keep":
            special = torch.tensor(
                [SPECIAL.fullmatch(self.text(token)) is not None for token in tokens.tolist()],
                dtype=torch.bool,
            )
            kept &= special if self.options.special == "only" else ~special
        return kept

    def kept(self, form: object, query: bool = False) -> Postings:
        """The rows that count. What no query holds meets nothing: words are left out of the queries alone, unless they are ranked."""
        assert isinstance(form, Postings)
        if query or self.options.top or self.question.normalize:
            form = form.select(
                torch.repeat_interleave(self.counts(form.tokens), form.starts.diff())
            )
        if self.options.top:
            form = form.select(strongest(form, self.options.top))
        return form

    # ------------------------------------------------------------ queries
    def asked(self, checkpoint: Checkpoint, ids: Ids) -> WordQueries:
        rows = concat_rows(list(self.gradients.read("query", checkpoint, [self.name], ids))).forms[
            self.name
        ]
        postings = self.kept(rows, query=True)
        if self.question.sum_queries:
            postings = mean(postings)
        norms = postings.sqnorm().sqrt()
        word = torch.repeat_interleave(postings.tokens, postings.starts.diff())
        if self.options.synonyms:
            postings, word = self._with_synonyms(postings, word)
        return WordQueries(postings.to(self.gradients.device), word, norms)  # type: ignore[arg-type]

    def _with_synonyms(self, postings: Postings, word: Tensor) -> tuple[Postings, Tensor]:
        """Each row also under the tokens near its word, times their likeness."""
        near, likeness = self._near(postings.tokens)
        at = torch.repeat_interleave(
            torch.arange(len(postings.tokens)), postings.starts.diff()
        )  # (T,): which token
        rows = torch.arange(len(word)).repeat_interleave(near.shape[1])
        tokens, times = near[at].flatten(), likeness[at].flatten()
        kept = times > 0
        rows, tokens, times = rows[kept], tokens[kept], times[kept]
        order = torch.argsort(tokens, stable=True)
        rows, tokens, times = rows[order], tokens[order], times[order]
        distinct, counts = torch.unique_consecutive(tokens, return_counts=True)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        values = postings.values[rows] * times[:, None].to(postings.values.dtype)
        example = postings.example[rows]
        return Postings(
            postings.shape,
            distinct,
            starts,
            example,
            values,
            torch.bincount(example, minlength=len(postings)),
        ), word[rows]

    def _near(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(U, 1 + K) each token and the K nearest that count, and their cosines: in embedding space, at the last checkpoint."""
        unit = self._directions
        cosines = unit[tokens] @ unit.T  # (U, V)
        cosines[:, ~self._countable] = -1
        cosines[torch.arange(len(tokens)), tokens] = -1
        likeness, near = cosines.topk(min(self.options.synonyms, len(unit) - 1), dim=1)
        return torch.cat([tokens[:, None], near], 1), torch.cat(
            [torch.ones(len(tokens), 1), likeness.float()], 1
        )

    @cached_property
    def _directions(self) -> Tensor:
        module = self.gradients.run.model.at(self.question.checkpoints[-1]).get_submodule(
            self.question.columns[self.name].module or ""
        )
        assert isinstance(module, nn.Embedding)
        weight = module.weight.detach().float().cpu()
        return weight / weight.norm(dim=1, keepdim=True).clamp(min=1e-30)

    @cached_property
    def _countable(self) -> Tensor:
        return self.counts(torch.arange(self.tokens))

    # ------------------------------------------------------------ scores
    def products(self, rows: Postings, asked: WordQueries) -> Tensor:
        """(N, Q) on the CPU; cosines with --normalize."""
        wide = (
            torch.float64
            if torch.float64 in (rows.values.dtype, asked.postings.values.dtype)
            else torch.float32
        )
        found = (
            rows.to(self.gradients.device, wide)
            .dot(asked.postings.to(self.gradients.device, wide))
            .cpu()
        )
        return (
            found * inverse(rows.sqnorm().sqrt(), asked.norms) if self.question.normalize else found
        )


class Split:
    """Ranked pairs into words: `split(position, entries)` gives per entry its (word, score), the pair's strongest direction first."""

    def __init__(
        self, words: WordSelector, queries: Sequence[WordQueries], ranking: Ranking
    ) -> None:
        self.words, self.queries, self.ranking = words, queries, ranking
        self._held: tuple[np.ndarray, list[EmbeddingRows]] | None = None

    def __call__(self, position: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        ids, held = self._rows(entries)
        found: list[dict[tuple[int, int], float]] = [{} for _ in entries]
        question = self.words.question
        for rows, asked, weight in zip(held, self.queries, question.weights, strict=True):
            times = weight.of(question.columns[self.words.name].names)
            tokens, own, values = asked.rows_of(position)
            norms = rows.sqnorm().sqrt()
            for terms, entry in zip(found, entries, strict=True):
                n = int(np.searchsorted(ids, entry.train))
                at = slice(int(rows.offsets[n]), int(rows.offsets[n + 1]))
                theirs = rows.ids[at]
                place = torch.searchsorted(theirs, tokens).clamp(max=max(0, len(theirs) - 1))
                both = (theirs[place] == tokens).nonzero().flatten() if len(theirs) else place[:0]
                products = (rows.values[at][place[both]].double() * values[both]).sum(1)
                scale = (
                    times * float(inverse(norms[n : n + 1], asked.norms[position : position + 1]))
                    if question.normalize
                    else times
                )
                for token, word, product in zip(
                    tokens[both].tolist(), own[both].tolist(), products.tolist(), strict=True
                ):
                    terms[token, word] = terms.get((token, word), 0.0) + scale * product
        return [self._named(terms, entry) for terms, entry in zip(found, entries, strict=True)]

    def _named(self, terms: dict[tuple[int, int], float], entry: Entry) -> list[tuple[str, float]]:
        sign = 1 if entry.kind == "proponent" else -1
        order = sorted(terms, key=lambda pair: (-sign * terms[pair], pair))
        text = self.words.text
        return [
            (text(token) if token == word else f"{text(token)} ~ {text(word)}", terms[token, word])
            for token, word in order
        ]

    def _rows(self, entries: Sequence[Entry]) -> tuple[np.ndarray, list[EmbeddingRows]]:
        """Rising ids, and their rows at each checkpoint: of all ranked pairs at once where only the top ones are, else of these."""
        if isinstance(self.ranking, TopRanking):
            if self._held is None:
                everything = [
                    entry
                    for query in range(self.ranking.queries)
                    for entry in self.ranking.entries(query)
                ]
                self._held = self._read(everything)
            return self._held
        return self._read(entries)

    def _read(self, entries: Sequence[Entry]) -> tuple[np.ndarray, list[EmbeddingRows]]:
        words = self.words
        ids = np.unique(np.array([entry.train for entry in entries], dtype=np.int64))
        read = (
            concat_rows(list(words.gradients.read("train", c, [words.name], ids))).forms[words.name]
            for c in words.question.checkpoints
        )
        return ids, [words.kept(form).rows() for form in read]


def strongest(form: Postings, k: int) -> Tensor:
    """(T,) mask: the k rows of largest norm of each example; equal ones by token."""
    norms = form.values.double().norm(dim=1)
    order = torch.argsort(-norms, stable=True)
    order = order[
        torch.argsort(form.example[order], stable=True)
    ]  # by example, then by falling norm
    starts = torch.cat([form.counts.new_zeros(1), form.counts.cumsum(0)])[:-1]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - starts[form.example[order]]
    return rank < k


def mean(postings: Postings) -> Postings:
    """All queries as one: the mean of their rows, token by token."""
    tokens = torch.repeat_interleave(torch.arange(len(postings.tokens)), postings.starts.diff())
    values = torch.zeros(len(postings.tokens), postings.values.shape[1], dtype=torch.float64)
    values.index_add_(0, tokens, postings.values.double() / len(postings))
    count = len(postings.tokens)
    example = torch.zeros(count, dtype=torch.int64)
    return replace(
        postings,
        starts=torch.arange(count + 1),
        example=example,
        values=values.to(postings.values.dtype),
        counts=torch.tensor([count]),
    )


def inverse(ours: Tensor, theirs: Tensor) -> Tensor:
    """(N, Q) of 1/(|G(x)| |G(q)|); 0 where a gradient is zero."""
    norms = ours[:, None] * theirs[None, :]
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))
