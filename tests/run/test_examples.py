"""Digests notice every change of an example, and only changes."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from influence_cli.run import datasets
from influence_cli.run.datasets import digest_item
from influence_cli.run.definition import load_definition
from tests.conftest import DEFINITION


@dataclass
class Item:
    pixels: torch.Tensor
    label: int


class Picture:
    """What PIL's images offer."""

    def __init__(self, pixels: bytes, size: tuple[int, int]) -> None:
        self.pixels, self.size = pixels, size

    def tobytes(self) -> bytes:
        return self.pixels


EXAMPLES = [
    torch.zeros(4),
    torch.zeros(2, 2),
    torch.zeros(4, dtype=torch.float64),
    torch.zeros(4, dtype=torch.bfloat16),
    torch.zeros(3, dtype=torch.bool),
    torch.zeros(0),
    torch.tensor(1),
    np.zeros(4),
    np.float32(1),
    np.array(["a", "b"]),
    np.array([1, "b"], dtype=object),
    1,
    1.0,
    True,
    "1",
    b"1",
    None,
    (1, 2),
    (2, 1),
    {"a": 1, "b": [2, 3]},
    {"a": 1, "b": [2, 4]},
    OrderedDict(x=torch.ones(2)),
    Item(torch.ones(2), 3),
    Item(torch.ones(2), 4),
    Picture(b"abcd", (2, 2)),
    Picture(b"abce", (2, 2)),
    Picture(b"abcd", (4, 1)),
]


def test_different_examples_have_different_digests():
    found = [digest_item(example) for example in EXAMPLES]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_same_example_has_the_same_digest(number):
    assert digest_item(EXAMPLES[number]) == digest_item(EXAMPLES[number])


def test_strides_do_not_count():
    values = torch.arange(6.0).view(2, 3)
    assert digest_item(values.t()) == digest_item(values.t().contiguous())


def test_each_label_is_read_once(make_run, monkeypatch):
    """More examples than the memory of descriptions holds, in an order that defeats it."""
    monkeypatch.setattr(datasets, "CACHED", 8)
    definition = DEFINITION + (
        "\n_label, CALLS = label, []\n\n\ndef label(example):\n"
        "    CALLS.append(1)\n    return _label(example)\n"
    )
    loaded = load_definition(make_run("run", definition) / "definition.py")
    examples = datasets.Examples(loaded, "train")
    first = [examples.label(index) for index in range(len(examples))]
    assert len(examples) > 8
    assert [examples.label(index) for index in range(len(examples))] == first
    assert len(loaded.module.CALLS) == len(examples)


def test_more_distinct_labels_than_fit_are_still_right(make_run, monkeypatch):
    monkeypatch.setattr(datasets, "CACHED", 2)
    definition = DEFINITION + "\ndef label(example):\n    return float(example[0].sum())\n"
    loaded = load_definition(make_run("run", definition) / "definition.py")
    examples = datasets.Examples(loaded, "train")
    for index in (*range(len(examples)), *reversed(range(len(examples)))):
        assert examples.label(index) == str(loaded.module.label(examples.item(index)))
