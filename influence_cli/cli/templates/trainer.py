"""Describes a Hugging Face Trainer run to `influence`, in plain functions.

influence runs this file. Put it into the Trainer's output folder, beside checkpoint-500/,
checkpoint-1000/, ... influence reads the learning rates from each trainer_state.json. Replace the
lines marked CHANGE.
"""

import torch
from datasets import load_from_disk
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
)

NAME = "checkpoint-500"  # CHANGE: any folder with the model's config.json and tokenizer
tokenizer = AutoTokenizer.from_pretrained(NAME)
pad = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)


def model():
    """The architecture, from its config. influence loads the weights from the checkpoints."""
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(NAME))


def train_data():
    """The tokenised examples, in the order in which Trainer got them.

    Each has input_ids, attention_mask and label.
    """
    return load_from_disk("train")  # CHANGE


def query_data():
    """The predictions to explain: a dataset like train_data()."""
    return load_from_disk("validation")  # CHANGE


def collate(items):
    """Pads all texts to one length, so that no example depends on others in its batch."""
    names = ("input_ids", "attention_mask", "label")
    return dict(pad([{name: item[name] for name in names} for item in items]))


def loss(model, batch):
    """One loss per example, shape (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def label(example):
    """Text for the columns query_label and train_label of the table."""
    return example["label"]


def describe(example):
    """Text for the columns query_text and train_text of the table."""
    return tokenizer.decode(example["input_ids"], skip_special_tokens=True)
