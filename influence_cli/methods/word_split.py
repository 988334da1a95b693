"""--by word: the score of a ranked pair, split into the words of both texts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from influence_cli.cache.gradient_rows import concat_rows
from influence_cli.gradients.sparse_forms import EmbeddingRows
from influence_cli.methods.word_selection import WordSelector
from influence_cli.output.ranking import Entry, RankedQueries

if TYPE_CHECKING:
    from influence_cli.methods.word_scores import WordQueries

WordPair = tuple[int, int]  # (token that both texts have, the query's own word)


class WordSplit:
    """`split(position, entries)` returns the (word, score) list of each entry.

    The words of a proponent come by falling score, those of an opponent by rising score.
    """

    def __init__(
        self, selector: WordSelector, queries: "Sequence[WordQueries]", ranking: RankedQueries
    ) -> None:
        """`queries`: of one pass, at each checkpoint."""
        self.selector, self.queries, self.ranking = selector, queries, ranking
        self._top_rows: tuple[np.ndarray, list[EmbeddingRows]] | None = None

    def __call__(self, position: int, entries: Sequence[Entry]) -> list[list[tuple[str, float]]]:
        ids, rows_at = self._rows(entries)
        scores: list[dict[WordPair, float]] = [{} for _ in entries]
        request = self.selector.request
        names = request.columns[self.selector.column].names
        for rows, queries, weight in zip(rows_at, self.queries, request.weights, strict=True):
            words = queries.rows_of(position)
            norms = rows.sqnorm().sqrt()
            query_norm = queries.norms[position]
            for pair_scores, entry in zip(scores, entries, strict=True):
                row = int(np.searchsorted(ids, entry.train))
                factor = weight.of(names)
                if request.normalize:
                    norm = float(norms[row] * query_norm)
                    factor = factor * float(1 / (norms[row] * query_norm)) if norm > 0 else 0.0
                for pair, product in shared_words(rows, row, *words):
                    pair_scores[pair] = pair_scores.get(pair, 0.0) + factor * product
        return [self._named(pairs, entry) for pairs, entry in zip(scores, entries, strict=True)]

    def _named(self, scores: dict[WordPair, float], entry: Entry) -> list[tuple[str, float]]:
        sign = 1 if entry.kind == "proponent" else -1
        order = sorted(scores, key=lambda pair: (-sign * scores[pair], pair))
        return [(self._name(*pair), scores[pair]) for pair in order]

    def _name(self, token: int, word: int) -> str:
        text = self.selector.text
        return text(token) if token == word else f"{text(token)} ~ {text(word)}"

    def _rows(self, entries: Sequence[Entry]) -> tuple[np.ndarray, list[EmbeddingRows]]:
        """Rising ids and their rows at each checkpoint.

        Of a top ranking the rows of all ranked pairs are read at once; else those of `entries`.
        """
        if not self.ranking.is_top:
            return self._read(entries)
        if self._top_rows is None:
            queries = range(self.ranking.queries)
            self._top_rows = self._read(
                [entry for query in queries for entry in self.ranking.entries(query)]
            )
        return self._top_rows

    def _read(self, entries: Sequence[Entry]) -> tuple[np.ndarray, list[EmbeddingRows]]:
        source, name = self.selector.source, self.selector.column
        ids = np.unique(np.array([entry.train for entry in entries], dtype=np.int64))
        forms = (
            concat_rows(list(source.read("train", checkpoint, [name], ids))).forms[name]
            for checkpoint in self.selector.request.checkpoints
        )
        return ids, [self.selector.select(form).rows() for form in forms]


def shared_words(
    rows: EmbeddingRows, row: int, tokens: Tensor, words: Tensor, values: Tensor
) -> list[tuple[WordPair, float]]:
    """The products of the words that a training example and a query share."""
    span = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
    train_tokens = rows.ids[span]
    if not len(train_tokens):
        return []
    place = torch.searchsorted(train_tokens, tokens).clamp(max=len(train_tokens) - 1)
    shared = (train_tokens[place] == tokens).nonzero().flatten()
    products = (rows.values[span][place[shared]].double() * values[shared]).sum(1)
    pairs = zip(tokens[shared].tolist(), words[shared].tolist(), strict=True)
    return list(zip(pairs, products.tolist(), strict=True))
