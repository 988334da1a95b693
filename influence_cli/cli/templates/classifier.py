"""Describes a training run to `influence`, in plain functions. influence runs this file.

The lines marked CHANGE use random data, so that this file runs unchanged. Replace them.
"""

import torch
from torch import nn
from torch.nn import functional as F


def model():
    """The architecture. influence loads the weights from checkpoints/*.safetensors."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))  # CHANGE


def train_data():
    """The examples to rank: a dataset with len(dataset) and dataset[i].

    An index gives the same example each time: no random augmentation.
    """
    generator = torch.Generator().manual_seed(0)  # CHANGE: numpy.load, your own Dataset, ...
    images, labels = (
        torch.rand(200, 8, 8, generator=generator),
        torch.randint(0, 10, (200,), generator=generator),
    )
    return torch.utils.data.TensorDataset(images, labels)


def query_data():
    """The predictions to explain: a dataset like train_data()."""
    generator = torch.Generator().manual_seed(1)  # CHANGE
    images, labels = (
        torch.rand(20, 8, 8, generator=generator),
        torch.randint(0, 10, (20,), generator=generator),
    )
    return torch.utils.data.TensorDataset(images, labels)


def loss(model, batch):
    """One loss per example, shape (B,): the training loss before the mean (reduction="none")."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


# Optional ----------------------------------------------------------------------------------------
# def measure(model, batch):
#     """What scores explain, shape (B,), larger = better: here the label's logit; default -loss."""
#     images, labels = batch
#     return model(images).gather(1, labels[:, None])[:, 0]


def label(example):
    """Text for the table's columns query_label and train_label, and for --group-by label."""
    return int(example[1])


# def describe(example):
#     """Text for the columns query_text and train_text of the table."""
#     return ...

# def collate(items):
#     """Makes a batch of a list of examples. Default: torch's default_collate."""
#     return ...
