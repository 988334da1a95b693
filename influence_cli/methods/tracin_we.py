"""TracIn-WE: influence through word embeddings, down to the word (Yeh et al. 2022,
arXiv:2202.11844).

score(x, q) = sum over checkpoints i of eta_i * sum over words w of G_w,i(x) . G_w,i(q)

G_w(x) is the sum of dl/de over the positions of word w in text x (equation 7, section 4). The inner
terms are the scores of words; they sum to the score. Padding never counts. With synonyms, a term
S(w, w') G_w(x) . G_w'(q) is added for the words w near the query's w' (section 4.3). Score > 0:
proponent.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from influence_cli.errors import UsageProblem
from influence_cli.methods.declaration import Method, deferred, option

if TYPE_CHECKING:
    from influence_cli.run.parameters import Column
    from influence_cli.run.run import Run


@dataclass(frozen=True)
class TracinWeOptions:
    """Which embedding is read, and which of its words count."""

    embedding: str | None = option(
        None,
        "Embedding module to read. [default: the only one, or the model's get_input_embeddings()]",
        "NAME",
    )
    special_tokens: str = option(
        "keep",
        "Tokens that token(id) writes like [CLS] or <s>. keep: use them; drop: ignore them; only: "
        "ignore all others.",
        "HOW",
        choices=("keep", "drop", "only"),
    )
    pad_id: int | None = option(
        None,
        "Token to ignore, such as padding. The padding_idx of the embedding is always ignored.",
        "ID",
    )
    top_words: int | None = option(
        None, "Use only the K words of each text with the largest gradient.", "K", minimum=1
    )
    synonyms: int = option(
        0, "Also match the K tokens nearest to each query token.", "K", minimum=1
    )


def select_columns(run: "Run", options: TracinWeOptions) -> "dict[str, Column]":
    """The column of the embedding that words go through.

    Raises UsageProblem where the model has none, or several and no name.
    """
    name = options.embedding
    columns = {column.module or "": column for column in run.embeddings.values()}
    listing = [
        f"{module or 'the model itself'} {column.shape}" for module, column in columns.items()
    ]
    if not columns:
        raise UsageProblem(
            "the model has no nn.Embedding",
            "expected: an embedding of token ids",
            "--method tracin reads all parameters and needs no embedding",
        )
    if name is None and len(columns) > 1:
        name = run.token_embedding
    if name is None and len(columns) > 1:
        raise UsageProblem(
            f"the model has {len(columns)} embeddings",
            *listing,
            "--embedding NAME chooses the one of token ids",
        )
    if name is not None and name not in columns:
        raise UsageProblem(f"--embedding {name}: no such embedding", *listing)
    column = columns[name] if name is not None else next(iter(columns.values()))
    return {column.name: column}


METHOD = Method(
    name="tracin-we",
    help="tracin through word embeddings, down to the word",
    question="Which words of which training texts lowered the query's loss?",
    needs="checkpoints with learning rates; a model with nn.Embedding over token ids",
    cost="as tracin, on the embedding rows of each text's words",
    source="Yeh et al. 2022, arXiv:2202.11844",
    score=deferred("influence_cli.methods.word_scores:score"),
    select_columns=select_columns,
    options=TracinWeOptions,
    parts=("checkpoint", "word"),
    pair_parts=("word",),
    refuses={
        "--layers": "it reads one embedding, which --embedding NAME chooses",
        "--project": "it reads the gradients of single words, which a projection does not keep",
    },
)
