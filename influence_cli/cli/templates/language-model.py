"""Describes the training run of a causal language model to `influence`, in plain functions.

influence runs this file. The lines marked CHANGE use random data and a small model, so that this
file runs unchanged. Replace them.
"""

import torch
from torch import nn
from torch.nn import functional as F

PADDING = 0


class Model(nn.Module):  # CHANGE: import your model
    def __init__(self, vocabulary=128, width=32):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 64, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight  # tied weights are one parameter

    def forward(self, ids):
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        return self.head(self.layer(self.embedding(ids), src_mask=mask, is_causal=True))


def model():
    """The architecture. influence loads the weights from checkpoints/*.safetensors."""
    return Model()


def texts(seed, number):  # CHANGE: token ids of your texts
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 16, (number,), generator=generator).tolist()
    return [torch.randint(1, 128, (length,), generator=generator) for length in lengths]


def train_data():
    """The examples to rank: a dataset with len(dataset) and dataset[i].

    An index gives the same example each time.
    """
    return texts(0, 100)


def query_data():
    """The predictions to explain: a dataset like train_data()."""
    return texts(1, 10)


def collate(items):
    """Makes a batch of texts of different lengths.

    It pads all texts to one length, so that no example depends on others in its batch.
    """
    return {"ids": torch.stack([F.pad(item, (0, 16 - len(item)), value=PADDING) for item in items])}


def loss(model, batch):
    """One loss per example, shape (B,): the mean over its own tokens, without padding."""
    ids = batch["ids"]
    logits, targets = model(ids)[:, :-1], ids[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    is_token = targets != PADDING
    return (losses.view(targets.shape) * is_token).sum(1) / is_token.sum(1)


def describe(example):
    """Text for the columns query_text and train_text. CHANGE: decode it with your tokenizer."""
    return " ".join(map(str, example.tolist()))
