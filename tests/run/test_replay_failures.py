"""Losses that fail only while recorded steps run again."""

import pytest

from tests.refusals import refused, replaced
from tests.training import DEFINITION, train

LOSS = 'return F.cross_entropy(model(batch[0]), batch[1], reduction="none")'


def failing(body: str) -> str:
    """The loss does something else for batches of four examples, the size of a step."""
    return replaced(DEFINITION, (LOSS, f"if len(batch[0]) == 4: {body}\n    {LOSS}"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("raise MemoryError('cannot allocate memory')", ("out of memory in a batch of 4",)),
        ("raise RuntimeError('a step fails')", ("loss()", "a step fails")),
        (
            "return F.cross_entropy(model(batch[0]), batch[1])",
            ("loss() returned () for 4 examples",),
        ),
        ("return 1.0", ("loss() returned float for 4 examples",)),
    ],
)
def test_a_loss_that_fails_in_a_step_is_named(body, says, tmp_path, influence):
    run = train(tmp_path / "run", steps=4, every=2)
    (run / "definition.py").write_text(failing(body))
    flags = ("--removals", "2", "--batch-size", "16", "--queries", "0:3", "--method", "random")
    refused(influence("evaluate", run, "tsloo", *flags), 1, *says)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("return model(batch[0]).sum()", ("measure() did not return one number per query",)),
        ("return model(batch[0])", ("expected: a tensor of shape (3,)",)),
        ("return model(batch[0]).sum(1) / 0", ("retraining diverged: measure() of query 0",)),
        ("raise MemoryError('cannot allocate memory')", ("out of memory in a batch of 3 queries",)),
        ("raise RuntimeError('a query fails')", ("measure()", "a query fails")),
    ],
)
def test_a_measure_that_fails_after_retraining_is_named(body, says, tmp_path, influence):
    run = train(tmp_path / "run", steps=4, every=2)
    text = f"{DEFINITION}\ndef measure(model, batch):\n    {body}\n"
    (run / "definition.py").write_text(text)
    flags = ("--removals", "2", "--batch-size", "16", "--queries", "0:3", "--method", "random")
    refused(influence("evaluate", run, "tsloo", *flags), 1, *says)
