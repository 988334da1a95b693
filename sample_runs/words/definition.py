"""Which part of Python's standard library is a docstring from? Word embeddings, pooled by attention, and a small GELU network."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
ORIGINS = ("internet", "concurrency", "numbers", "code")
WORDS, WIDTH = 1400, 16  # of the vocabulary, and numbers per word
PAD, CLS, SEP, UNK = range(4)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH, padding_idx=PAD)
        self.words.weight.data *= 0.2  # plain SGD forgets larger random embeddings too slowly
        self.attention = nn.Linear(WIDTH, 1, bias=False)
        self.hidden = nn.Linear(WIDTH, 2 * WIDTH)
        self.output = nn.Linear(2 * WIDTH, len(ORIGINS))

    def forward(self, texts):
        words = self.words(texts)  # (B, S, WIDTH)
        likes = self.attention(words).squeeze(-1).masked_fill(texts == PAD, -torch.inf).softmax(-1)
        return self.output(F.gelu(self.hidden((likes.unsqueeze(-2) @ words).squeeze(-2))))


def model():
    return Classifier()


def load(split):
    with np.load(HERE / "words.npz") as arrays:
        texts, origins = arrays[f"{split}_texts"], arrays[f"{split}_origins"]
    return torch.utils.data.TensorDataset(
        torch.from_numpy(texts).long(), torch.from_numpy(origins).long()
    )


def train_data():
    return load("train")


def query_data():
    return load("query")


def outputs(model, batch):
    return model(batch[0])


def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")


def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)


def label(example):
    return ORIGINS[int(example[1])]


def describe(example):
    return " ".join(token(int(id)) for id in example[0] if id not in (PAD, CLS, SEP))


def token(id):
    return vocabulary()[id]


@functools.cache
def vocabulary():
    return (HERE / "vocabulary.txt").read_text().split("\n")[:-1]
