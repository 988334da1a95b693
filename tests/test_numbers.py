"""Numbers at the edge of what floats hold, and losses that say nothing: right scores, or a message."""


import pytest

from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'

# query 0 has no target: its loss and its gradient are 0
TOKENS = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Embedding(12, 4), nn.Tanh(), nn.Linear(4, 12))

def examples(seed, number):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 12, (number, 5), generator=generator)

def train_data():
    ids = examples(0, 8)
    return [(row, row.clone()) for row in ids]

def query_data():
    ids = examples(1, 3)
    return [(row, torch.full((5,), -100) if i == 0 else row.clone()) for i, row in enumerate(ids)]

def loss(model, batch):
    ids, targets, texts = batch
    logits = model(ids)[:, :-1].transpose(1, 2)
    losses = F.cross_entropy(logits, targets[:, 1:], reduction="none", ignore_index=-100)
    return losses.sum(1)

def collate(items):  # texts in a batch: one example at a time
    return (
        torch.stack([item[0] for item in items]),
        torch.stack([item[1] for item in items]),
        [str(item[0].tolist()) for item in items],
    )
"""


# ---------------------------------------------------------------- zero gradients
@pytest.mark.parametrize("flags", [(), ("--cache", "none"), ("--top", "all"), ("--normalize",)])
def test_a_query_without_targets_has_zero_scores(flags, make_run, influence):
    result = influence("score", make_run(definition=TOKENS), "--queries", "0", *flags)
    assert result.code == 0, result.err
    assert all(float(row["score"]) == 0 for row in result.rows)
    assert len(result.rows) == (8 if "all" in flags else 0)


def test_check_reads_a_cached_zero_gradient(make_run, influence):
    run = make_run(definition=TOKENS)
    assert influence("score", run, "--queries", "0").code == 0
    assert influence("check", run, "--queries", "0").code == 0


def test_check_names_the_example_whose_loss_is_nan(make_run, influence):
    loss = LOSS + " + torch.where(batch[0][:, 0] == train_data()[3][0][0], torch.nan, 0.0)"
    run = make_run(definition=replaced(DEFINITION, (LOSS, loss)))
    refused(influence("check", run), 1, "the loss is not finite", "example 3 of train_data()")
