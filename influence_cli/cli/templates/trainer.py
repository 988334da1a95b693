"""Describes a Hugging Face Trainer run to `influence`, in plain functions.

influence runs this file. Put it into the Trainer's output folder, beside checkpoint-500/,
checkpoint-1000/, ... Replace the lines marked CHANGE. `influence init DIR --data FILE` fills them
in by itself.
"""

from pathlib import Path

from influence_cli import huggingface
from influence_cli.data import table

HERE = Path(__file__).parent
task = huggingface.Task(
    "sequence-classification",  # CHANGE: or causal-lm, seq2seq-lm, masked-lm, ...
    HERE / "checkpoint-500",  # CHANGE: any folder with the model's config.json and tokenizer
    text=["text"],  # CHANGE: the column of the text, or two columns of a pair
    label="label",  # CHANGE: the column of the label
    max_length=512,
)


def model():
    """The architecture. influence loads the weights from the checkpoints."""
    return task.model()


def train_data():
    """The examples to rank, in the order of their file."""
    return task.examples(table(HERE / "train.csv"))  # CHANGE


def query_data():
    """The predictions to explain."""
    return task.examples(table(HERE / "validation.csv"))  # CHANGE


def collate(items):
    """A batch of examples, padded to its longest text."""
    return task.collate(items)


def loss(model, batch):
    """One loss per example, shape (B,)."""
    return task.loss(model, batch)


def label(example):
    """Text for the columns query_label and train_label."""
    return task.label_text(example)


def describe(example):
    """Text for the columns query_text and train_text of the table."""
    return task.describe(example)
