"""A small GELU network on scikit-learn's handwritten digits (8 x 8 pixels, 0 to 16), with some training labels flipped on purpose."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HERE = Path(__file__).parent
TRAIN = 1400  # the first 1,400 images train, the other 397 are queries


def model():
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 10))


def digits():
    with np.load(HERE / "digits.npz") as arrays:
        return torch.from_numpy(arrays["images"]).float() / 16, torch.from_numpy(
            arrays["labels"]
        ).long()


def train_data():
    images, truth = digits()
    labels = truth.clone()
    for index, wrong in json.loads((HERE / "flipped.json").read_text()).items():
        labels[int(index)] = wrong
    return torch.utils.data.TensorDataset(images[:TRAIN], labels[:TRAIN], truth[:TRAIN])


def query_data():
    images, truth = digits()
    return torch.utils.data.TensorDataset(images[TRAIN:], truth[TRAIN:], truth[TRAIN:])


def outputs(model, batch):
    return model(batch[0])


def loss_from_outputs(outputs, batch):
    return F.cross_entropy(outputs, batch[1], reduction="none")


def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)


def label(example):
    return int(example[1])


def describe(example):
    return "" if example[1] == example[2] else f"really a {int(example[2])}"


def relabel(example, label):
    image, _, truth = example
    return image, torch.tensor(label), truth


def image(example):
    return example[0].reshape(8, 8)
