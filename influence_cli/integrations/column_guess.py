"""Guesses which column of a table is the text, the label, the picture and the id."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from influence_cli.errors import UsageProblem, listed
from influence_cli.integrations.hf_encoding import is_encoded

Rows = Sequence[Mapping[str, Any]]  # Any: the user's values
TEXTS = (
    *("text", "sentence", "content", "review", "utterance", "comment", "document", "body"),
    *("question", "query", "message", "title", "prompt"),
)
PAIRS = (
    *(("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")),
    *(("question", "sentence"), ("question", "context"), ("query", "passage")),
    *(("text_a", "text_b"), ("text1", "text2"), ("text", "text_pair")),
)
CONTINUATIONS = (
    *(("prompt", "completion"), ("prompt", "response"), ("instruction", "output")),
    *(("instruction", "response"), ("question", "answer")),
)
SOURCES = (
    *(("source", "target"), ("document", "summary"), ("article", "highlights")),
    *(("article", "summary"), ("text", "summary"), ("text", "target"), ("input", "output")),
    *(("input", "target"), ("question", "answer"), ("prompt", "completion")),
)
CHATS = ("messages", "conversations", "conversation")
WORDS = ("tokens", "words")
LABELS = (
    *("label", "labels", "class", "category", "intent", "sentiment", "target", "score"),
    *("rating", "stars", "y", "ner_tags", "tags", "pos_tags", "chunk_tags"),
)
IMAGES = ("image", "img", "picture", "pixel_values", "x", "file", "path", "file_name")
IDS = ("id", "idx", "guid", "uid", "uuid", "example_id", "row_id", "index")


@dataclass(frozen=True)
class ColumnChoice:
    """The columns that a definition reads."""

    text: tuple[str, ...] = ()
    label: str | None = None
    image: str | None = None
    id: str | None = None

    def __str__(self) -> str:
        parts = {"text": ", ".join(self.text), "image": self.image}
        parts |= {"label": self.label, "id": self.id}
        return "; ".join(f"{name}: {value}" for name, value in parts.items() if value)


def choose_columns(
    kind: str,
    columns: Sequence[str],
    sample: Rows,
    text: Sequence[str],
    label: str | None,
    id: str | None,
) -> ColumnChoice:
    """The given columns, and guesses for those that are not given.

    Raises UsageProblem for a column that the table lacks, and where no guess is possible.
    """
    for flag, names in (("--text", text), ("--label", [label]), ("--id", [id])):
        for name in names:
            if name is not None and name not in columns:
                raise UsageProblem(
                    f"{flag} {name}: the data has no such column",
                    f"found: {listed(list(columns))}",
                )
    known = {name.lower(): name for name in reversed(columns)}
    id = id or first_of(known, IDS)
    label = label or guess_label(kind, known)
    if kind == "image-classification":
        image = text[0] if text else first_of(known, IMAGES)
        if image is None:
            raise missing_column("a picture", columns)
        return ColumnChoice((), label, image, id)
    if is_encoded(sample[0]) and not text:
        return ColumnChoice((), label, None, id)
    texts = tuple(text) or guess_texts(kind, known, sample, {label, id})
    if kind == "seq2seq-lm" and len(texts) < 2:
        raise missing_column("a source and a target text", columns)
    if not texts:
        raise missing_column("text", columns)
    return ColumnChoice(texts, label, None, id)


def missing_column(what: str, columns: Sequence[str]) -> UsageProblem:
    return UsageProblem(
        f"no column of the data looks like {what}",
        f"found: {listed(list(columns))}",
        "--text COLUMN names it (twice for a pair of texts)",
    )


def first_of(known: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((known[name] for name in names if name in known), None)


def guess_label(kind: str, known: Mapping[str, str]) -> str | None:
    return None if kind in ("causal-lm", "masked-lm", "seq2seq-lm") else first_of(known, LABELS)


def guess_texts(
    kind: str, known: Mapping[str, str], sample: Rows, others: set[str | None]
) -> tuple[str, ...]:
    pairs = {"causal-lm": CONTINUATIONS, "seq2seq-lm": SOURCES, "sequence-classification": PAIRS}
    for first, second in pairs.get(kind, ()):
        if first in known and second in known:
            return known[first], known[second]
    singles = {"token-classification": WORDS, "causal-lm": CHATS}.get(kind, ())
    name = first_of(known, singles) or first_of(known, TEXTS)
    if name is not None:
        return (name,)
    lengths = {
        column: sum(len(row[column]) for row in sample)
        for column in known.values()
        if column not in others and all(isinstance(row.get(column), str) for row in sample)
    }
    return (max(lengths, key=lambda column: lengths[column]),) if lengths else ()


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
