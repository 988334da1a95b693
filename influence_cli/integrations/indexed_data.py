"""Datasets and batches that carry the index of each example, so that a recorder knows it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from influence_cli.errors import TrajectoryError

KEY = "influence_index"  # of a batch that is a mapping


class IndexedItem(NamedTuple):
    """An item that is no mapping, with its index."""

    item: Any  # the user's
    position: int


class IndexedBatch(NamedTuple):
    """A batch that is no mapping, with the indices (B,) of its items."""

    batch: Any  # the user's
    indices: Tensor


class IndexedDataset:
    """A map-style dataset whose items carry their index: a mapping under KEY."""

    def __init__(self, dataset: Any) -> None:  # Any: the user's
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return attach_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(list(indices))
        else:
            items = [self.dataset[index] for index in indices]
        return list(map(attach_index, items, indices))


class IndexedCollator:
    """Collates indexed items with the user's function; the batch carries their indices.

    Items without an index pass to the user's function alone.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> Any:
        pairs = [split_index(item) for item in items]
        if not pairs or pairs[0][1] is None:
            return self.collate(items)
        batch = self.collate([item for item, _ in pairs])
        indices = torch.tensor([index for _, index in pairs])
        if not isinstance(batch, Mapping):
            return IndexedBatch(batch, indices)
        if KEY in batch:
            raise TrajectoryError(
                f"a batch has a key {KEY} of its own", "expected: another name, for the recorder"
            )
        batch[KEY] = indices  # type: ignore[index]  # a dict or a BatchEncoding
        return batch


def attach_index(item: Any, index: int) -> Any:
    return {**item, KEY: int(index)} if isinstance(item, Mapping) else IndexedItem(item, int(index))


def split_index(item: Any) -> tuple[Any, int | None]:
    """An item without its index, and the index; None where it has none."""
    if isinstance(item, IndexedItem):
        return item.item, item.position
    if isinstance(item, Mapping) and KEY in item:
        return {key: value for key, value in item.items() if key != KEY}, item[KEY]
    return item, None


def check_map_style(dataset: Any, owner: str) -> None:
    """Raises TrajectoryError for a dataset whose items have no index."""
    if dataset is None or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise TrajectoryError(
            f"the training data of {owner} is {type(dataset).__name__}, which has no indices",
            "expected: a dataset with len() and [index]",
            "a stream: read it into a list or a datasets.Dataset first",
        )
