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
        return torch.from_numpy(arrays["images"]).float() / 16, torch.from_numpy(arrays["labels"]).long()


def train_data():
    images, labels = digits()
    for index, wrong in json.loads((HERE / "flipped.json").read_text()).items():
        labels[int(index)] = wrong
    return torch.utils.data.TensorDataset(images[:TRAIN], labels[:TRAIN])


def query_data():
    images, labels = digits()
    return torch.utils.data.TensorDataset(images[TRAIN:], labels[TRAIN:])


def loss(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def label(example):
    return int(example[1])
