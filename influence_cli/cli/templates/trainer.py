"""What `influence` needs to know of a Hugging Face Trainer run. Plain functions; loading this file runs it.

Lay it beside the Trainer's output: checkpoint-500/model.safetensors, checkpoint-1000/..., each with its trainer_state.json, from which
the learning rates are read. CHANGE the names of model and data.
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
    """The architecture, from its config alone; weights are loaded from the checkpoints."""
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(NAME))


def train_data():
    """The tokenised examples that Trainer was given, in the same order: input_ids, attention_mask, label."""
    return load_from_disk("train")  # CHANGE


def query_data():
    """The predictions to explain, in the same form."""
    return load_from_disk("validation")  # CHANGE


def collate(items):
    """Pad to one length, so that an example never depends on its neighbours."""
    kept = ("input_ids", "attention_mask", "label")
    return dict(pad([{name: item[name] for name in kept} for item in items]))


def loss(model, batch):
    """One loss per example, shape (B,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")


def label(example):
    """Text for the columns query_label and train_label."""
    return example["label"]


def describe(example):
    """Text for the columns query_text and train_text."""
    return tokenizer.decode(example["input_ids"], skip_special_tokens=True)
