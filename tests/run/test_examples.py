"""Digests notice every change of an example, and only changes."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from influence_cli.run.datasets import digest_item


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
