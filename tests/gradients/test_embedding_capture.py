"""The capture of an embedding's output, where it is not as usual."""

import pytest

from tests.refusals import refused
from tests.test_numbers import TOKENS

TWO = TOKENS.replace(
    "    return nn.Sequential(nn.Embedding(12, 4), nn.Tanh(), nn.Linear(4, 12))",
    """    return Two()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle, self.never = nn.Embedding(12, 4), nn.Embedding(12, 4), nn.Embedding(12, 4)
        self.out = nn.Linear(4, 12)

    def forward(self, ids):
        self.idle(ids)
        return self.out(torch.tanh(self.used(ids)))""",
)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("idle", "does not depend on the output of the embedding idle"),
        ("never", "never calls the embedding never"),
    ],
)
def test_an_embedding_that_the_loss_does_not_use_is_refused(name, says, make_run, influence):
    result = influence(
        "score", make_run(definition=TWO), "--method", "tracin-we", "--embedding", name
    )
    refused(result, 1, says, "--embedding")


def test_the_embedding_that_the_loss_uses_is_scored(make_run, influence):
    flags = ("--method", "tracin-we", "--embedding", "used", "--queries", "1:")
    result = influence("score", make_run(definition=TWO), *flags)
    assert result.code == 0, result.err
    assert result.rows


# one tensor in a batch of one, a shorter one in a batch: the loss works alone, and at first
FAILS_LATER = TOKENS.replace(
    "    logits = model(ids)",
    """    if len(ids) > 1 and bool((ids[:, 0] == LAST).any()):
        raise RuntimeError("a batch unlike the first")
    logits = model(ids)""",
).replace("def query_data", "LAST = int(examples(0, 8)[5, 0])\n\ndef query_data")


def test_a_batch_that_fails_is_captured_one_by_one(make_run, influence):
    assert FAILS_LATER.count("LAST") == 2
    flags = ("--method", "tracin-we", "--top", "all", "--batch-size", "2")
    tables = [
        influence("score", make_run(name, text), *flags)
        for name, text in (("plain", TOKENS), ("fails", FAILS_LATER))
    ]
    assert tables[1].code == 0, tables[1].err
    assert "some batches one example at a time" in tables[1].err
    plain, fails = ([float(row["score"]) for row in table.rows] for table in tables)
    assert fails == pytest.approx(plain, rel=1e-5, abs=1e-7)
