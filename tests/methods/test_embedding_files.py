"""The files of rows that an embedding's map lists must tile the steps of their part."""

import json
from types import SimpleNamespace

import pytest
import torch

from influence_cli.errors import CacheError
from influence_cli.methods.reverse.embedding_store import ROW_FILES, EmbeddingStore
from influence_cli.storage.safetensors_io import write_tensors


def listed_files(path, files, first_used=0):
    """row_files of the part 0..6. `first_used`: steps below it have no examples."""
    write_tensors(path, {"map": torch.zeros(1)}, {ROW_FILES: json.dumps(files)})
    plan = SimpleNamespace(
        count_occurrences=lambda steps: sum(step >= first_used for step in steps)
    )
    store = SimpleNamespace(map_path=lambda part: path, plan=plan)
    return EmbeddingStore.row_files(store, (0, 6))


@pytest.mark.parametrize("first_used", [0, 2])
def test_files_that_tile_the_part_are_listed_last_first(first_used, tmp_path):
    files = [[4, 6], [first_used, 4]]
    assert listed_files(tmp_path / "map", files, first_used) == [(4, 6), (first_used, 4)]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([[4, 6]], "no rows of the steps below 4"),
        ([[4, 6], [1, 4]], "no rows of the steps below 1"),
        ([], "no rows of the steps below 6"),
        ([[4, 6], [0, 3]], "do not tile the steps below 4"),  # a gap
        ([[4, 6], [0, 5]], "do not tile the steps below 4"),  # an overlap
        ([[0, 4], [4, 6]], "do not tile the steps below 6"),  # another order
        ([[6, 6], [0, 6]], "do not tile the steps below 6"),  # an empty file
        ([[-1, 6]], "do not tile the steps below 6"),
    ],
)
def test_files_that_do_not_tile_the_part_are_refused(files, says, tmp_path):
    with pytest.raises(CacheError, match=says):
        listed_files(tmp_path / "map", files)
