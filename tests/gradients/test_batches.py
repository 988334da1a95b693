"""Batches of every structure keep their type and order when tensors are moved."""

from collections import OrderedDict, namedtuple
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch

from influence_cli.gradients.batches import leaves, map_tensors, without_tensors

Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Texts:
    ids: torch.Tensor
    name: str
    count: int = field(init=False, default=3)


class Locked(Mapping):
    """A mapping that can't be built from a dict."""

    def __init__(self, *, x):
        self.x = x

    def __getitem__(self, key):
        return {"x": self.x}[key]

    def __iter__(self):
        return iter(["x"])

    def __len__(self):
        return 1


ONE = torch.ones(2)


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        (Pair(ONE, [ONE, "text"]), Pair),
        ((ONE, {"x": ONE}), tuple),
        ([ONE, None], list),
        (OrderedDict(b=ONE, a=ONE), OrderedDict),
        (Locked(x=ONE), dict),  # the content counts
        (Texts(ONE, "a"), Texts),
        (Texts, type),  # a class is no batch
        (7, int),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_batch_keeps_its_structure(batch, kind):
    doubled = map_tensors(lambda tensor: 2 * tensor, batch)
    assert type(doubled) is kind
    before, after = leaves(batch), leaves(doubled)
    assert len(before) == len(after)
    assert all(torch.equal(2 * one, two) for one, two in zip(before, after, strict=True))


def test_other_contents_are_compared_without_tensors():
    assert without_tensors(Pair(ONE, "a")) == without_tensors(Pair(2 * ONE, "a")) == Pair(None, "a")
    assert without_tensors(Pair(ONE, "a")) != without_tensors(Pair(ONE, "b"))
    assert list(map_tensors(lambda tensor: tensor, OrderedDict(b=ONE, a=ONE))) == ["b", "a"]
