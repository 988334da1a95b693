"""Large files bypass the page cache where the file system can, and are the same where it cannot."""

import errno
import os

import numpy as np
import pytest
import torch

from influence_cli.storage import safetensors_io
from influence_cli.storage.safetensors_io import (
    PIECE,
    TensorFile,
    TruncatedFile,
    read_tensors,
    write_tensors,
)

VALUES = {
    "small": torch.arange(7),
    "large": torch.arange(PIECE // 4 + 1000, dtype=torch.float32).reshape(-1, 1),
}


@pytest.fixture(params=[True, False], ids=["direct", "no O_DIRECT"])
def direct(request, monkeypatch):
    """Whether the file system has O_DIRECT. Nothing seems to be in the page cache."""
    if not safetensors_io.DIRECT:
        pytest.skip("this system has no O_DIRECT")
    plain_open, used = os.open, []

    def open_file(path, flags, *mode, **options):
        if flags & safetensors_io.DIRECT:
            used.append(path)
            if not request.param:
                raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(TensorFile, "_cached", lambda self, start, stop: False)
    return used


def test_a_large_file_is_read_as_it_was_written(direct, tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, VALUES, {})
    tensors = read_tensors(path)
    assert direct, "O_DIRECT was not tried"
    assert tensors.keys() == VALUES.keys()
    assert all(torch.equal(tensors[name], value) for name, value in VALUES.items())


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_tensors(path, VALUES, {})
    monkeypatch.setattr(TensorFile, "_map_cached", lambda self, start, stop: None)
    with TensorFile(path) as file:
        os.truncate(path, PIECE // 2)
        with pytest.raises(TruncatedFile):
            file.read(["large"])
        with pytest.raises(TruncatedFile):
            file.read_rows("large", np.array([5, 6, PIECE // 4 + 900]))
