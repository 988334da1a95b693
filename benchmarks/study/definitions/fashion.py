"""A small convolutional network on Fashion-MNIST; fashion.npz has the first images."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat",
    "sandal", "shirt", "sneaker", "bag", "boot",
)  # fmt: skip


def model():
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2), nn.GELU(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), nn.GELU(),
        nn.Flatten(), nn.Linear(784, 32), nn.GELU(), nn.Linear(32, 10),
    )  # fmt: skip


def load(split):
    with np.load(Path(__file__).with_name("fashion.npz")) as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    images = (torch.from_numpy(images).float()[:, None] / 255 - 0.286) / 0.353
    return torch.utils.data.TensorDataset(images, torch.from_numpy(labels).long())


def train_data():
    return load("train")


def query_data():
    return load("test")


def outputs(model, batch):
    return model(batch[0])


def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")


def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)


def sample(outputs, batch, generator):
    labels = torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
    return batch[0], labels


def features(model, batch):
    return model[:-1](batch[0])


def relabel(example, label):
    image, _ = example
    return image, torch.tensor(label)


def label(example):
    return int(example[1])


def describe(example):
    return CLASSES[int(example[1])]
