"""A character model of two blocks on windows of Shakespeare; text.npz has the windows."""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

LETTERS, LENGTH, WIDTH, HEADS = 65, 64, 64, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.hidden_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.project = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.hidden, self.output = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, states):
        batch, length, _ = states.shape
        heads = self.attention(self.attention_norm(states)).view(batch, length, 3, HEADS, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2)) / key.shape[-1] ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=states.device).triu(1)
        mixed = weights.masked_fill(future, -torch.inf).softmax(-1) @ value
        states = states + self.project(mixed.transpose(1, 2).reshape(batch, length, -1))
        return states + self.output(F.gelu(self.hidden(self.hidden_norm(states))))


class Gpt(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, LETTERS)

    def hidden_states(self, letters):
        places = torch.arange(letters.shape[1], device=letters.device)
        return self.norm(self.blocks(self.letters(letters) + self.places(places)))

    def forward(self, letters):
        return self.head(self.hidden_states(letters))


def model():
    return Gpt()


def load(split):
    with np.load(Path(__file__).with_name("text.npz")) as arrays:
        return torch.utils.data.TensorDataset(torch.from_numpy(arrays[split]).long())


def train_data():
    return load("train")


def query_data():
    return load("query")


def outputs(model, batch):
    return model(batch[0][:, :-1])


def loss_from_outputs(outputs, batch):
    losses = F.cross_entropy(outputs.transpose(1, 2), batch[0][:, 1:], reduction="none")
    return losses.mean(1)


def loss(model, batch):
    return loss_from_outputs(outputs(model, batch), batch)


def sample(outputs, batch, generator):
    chances = outputs.softmax(2).flatten(0, 1)
    drawn = torch.multinomial(chances, 1, generator=generator).view(len(outputs), -1)
    return (torch.cat([batch[0][:, :1], drawn], 1),)


def features(model, batch):
    return model.hidden_states(batch[0][:, :-1]).mean(1)


def describe(example):
    return "".join(letters()[int(number)] for number in example[0])


@functools.cache
def letters():
    with np.load(Path(__file__).with_name("text.npz")) as arrays:
        return str(arrays["letters"])
