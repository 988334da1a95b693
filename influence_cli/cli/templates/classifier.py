"""What `influence` needs to know of a training run. Plain functions; loading this file runs it.

The parts marked CHANGE build a stand-in, so that the file runs as it is.
"""

import torch
from torch import nn
from torch.nn import functional as F


def model():
    """The architecture. Weights are loaded from checkpoints/*.safetensors, so their initial values don't matter."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))  # CHANGE


def train_data():
    """The examples to be ranked: len(dataset) and dataset[i], the same example at the same index each time (no augmentation)."""
    generator = torch.Generator().manual_seed(0)  # CHANGE: numpy.load, your own Dataset, ...
    images, labels = (
        torch.rand(200, 8, 8, generator=generator),
        torch.randint(0, 10, (200,), generator=generator),
    )
    return torch.utils.data.TensorDataset(images, labels)


def query_data():
    """The predictions to explain, in the same form."""
    generator = torch.Generator().manual_seed(1)  # CHANGE
    images, labels = (
        torch.rand(20, 8, 8, generator=generator),
        torch.randint(0, 10, (20,), generator=generator),
    )
    return torch.utils.data.TensorDataset(images, labels)


def loss(model, batch):
    """One loss per example, shape (B,): what training minimised, before it was averaged. Hence reduction="none"."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


# Optional ---------------------------------------------------------------------------------------------------------------
# def measure(model, batch):
#     """(B,), larger = better: what a query's score is about, where that is not -loss. For example the logit of the label."""
#     images, labels = batch
#     return model(images).gather(1, labels[:, None])[:, 0]


def label(example):
    """Text for the columns query_label and train_label, and for --group-by label."""
    return int(example[1])


# def describe(example):
#     """Text for the columns query_text and train_text."""
#     return ...

# def collate(items):
#     """A list of examples -> a batch, where torch's default does not do."""
#     return ...
