"""What the capture of a split knows of a run's columns."""

import json

BAGS = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(60, 4), nn.Linear(4, 1)


def model():
    return Model()

def train_data():
    return [torch.tensor([i, i + 7]) for i in range(20)]

def query_data():
    return train_data()[:3]

def loss(model, ids):
    # rows by index: no layer rule, so torch.func computes dense gradients of the table
    return model.out(model.words.weight[ids].mean(1)).square()[:, 0]
"""


def test_a_table_of_words_that_torch_func_computes_is_stored_as_its_rows(make_run, influence):
    run = make_run(definition=BAGS)
    assert influence("cache", run, "--layers", "words.weight").code == 0
    [record] = run.glob(".influence/*/sizes-train.json")
    # two rows of 4 float32 numbers, their ids, and the offsets
    [[form, size]] = json.loads(record.read_text())["forms"].values()
    assert form in ("rows", "postings") and size <= 2 * (4 * 4 + 8) + 2 * 8
