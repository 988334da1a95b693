"""What `influence` needs to know of the training run of a causal language model. Plain functions; loading this file runs it.

The parts marked CHANGE build a stand-in, so that the file runs as it is.
"""

import torch
from torch import nn
from torch.nn import functional as F

PADDING = 0


class Model(nn.Module):  # CHANGE: import yours
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
    """The architecture. Weights are loaded from checkpoints/*.safetensors, so their initial values don't matter."""
    return Model()


def texts(seed, number):  # CHANGE: token ids of your texts
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 16, (number,), generator=generator).tolist()
    return [torch.randint(1, 128, (length,), generator=generator) for length in lengths]


def train_data():
    """The examples to be ranked: len(dataset) and dataset[i], the same example at the same index each time."""
    return texts(0, 100)


def query_data():
    """The predictions to explain, in the same form."""
    return texts(1, 10)


def collate(items):
    """Texts of different lengths -> one padded batch; pad to one length, so that an example never depends on its neighbours."""
    return {"ids": torch.stack([F.pad(item, (0, 16 - len(item)), value=PADDING) for item in items])}


def loss(model, batch):
    """One loss per example, shape (B,): the mean over its own tokens. Padding never counts."""
    ids = batch["ids"]
    logits, targets = model(ids)[:, :-1], ids[:, 1:]
    each = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(
        targets.shape
    )
    kept = targets != PADDING
    return (each * kept).sum(1) / kept.sum(1)


def describe(example):
    """Text for the columns query_text and train_text. CHANGE: decode with your tokenizer."""
    return " ".join(map(str, example.tolist()))
