"""Folders of torch.distributed.checkpoint: read with an allow-list, never with torch's own pickle."""

import os
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tests.integrations.test_pickled_files import Command
from tests.refusals import refused


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def save_distributed(folder, content):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save(content, checkpoint_id=folder)
    return folder


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return optimizer


def same_weights(path, model):
    saved, state = load_file(path), model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


@pytest.mark.parametrize("app", [False, True], ids=["plain", "under app"])
def test_weights_step_and_rate_are_read(app, tmp_path, influence):
    """As torch's tutorials save them: the model beside its optimizer, perhaps under `app`."""
    model = net()
    content = {"model": model.state_dict(), "optim": trained(model).state_dict()}
    content = {"app": content} if app else content | {"step": 40}
    save_distributed(tmp_path / "from" / "step-40", content)
    result = influence("convert", tmp_path / "from", tmp_path / "to")
    path = tmp_path / "to" / "step-000040.safetensors"
    assert (result.code, result.out) == (0, f"{path}\n"), result.err
    same_weights(path, model)
    with safe_open(path, "pt") as file:
        assert file.metadata()["learning_rate"] == "0.25"


def test_a_bare_state_dict_in_one_folder_is_read(tmp_path, influence):
    model = net().to(torch.bfloat16)
    save_distributed(tmp_path / "iter_0000007", model.state_dict())
    assert influence("convert", tmp_path / "iter_0000007", tmp_path / "to").code == 0
    same_weights(tmp_path / "to" / "step-000007.safetensors", model)


def test_chunks_of_a_tensor_are_joined(tmp_path, influence):
    """Two ranks save the halves of a tensor: its metadata lists two chunks."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    folder = save_distributed(
        tmp_path / "step-1", {"a": torch.arange(6.0), "b": torch.arange(6.0, 12.0)}
    )
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry, info = metadata.state_dict_metadata["a"], metadata.storage_data
    halves = [ChunkStorageMetadata(torch.Size([start]), torch.Size([6])) for start in (0, 6)]
    entry.size, entry.chunks = torch.Size([12]), halves
    places = {index.fqn: value for index, value in info.items()}
    metadata.state_dict_metadata = {"a": entry}
    metadata.planner_data = {"a": ("a",)}
    metadata.storage_data = {
        MetadataIndex("a", [start], number): places[name]
        for number, (start, name) in enumerate([(0, "a"), (6, "b")])
    }
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    assert influence("convert", folder, tmp_path / "to").code == 0
    saved = load_file(tmp_path / "to" / "step-000001.safetensors")
    assert torch.equal(saved["a"], torch.arange(12.0))


def test_a_class_that_is_not_of_such_metadata_is_refused_and_nothing_runs(tmp_path, influence):
    folder = save_distributed(tmp_path / "step-1", net().state_dict())
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["0.bias"] = Command(f"touch {tmp_path / 'ran'}")
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    result = influence("convert", folder, tmp_path / "to")
    refused(
        result,
        1,
        ".metadata names a class that no metadata",
        f"found: {os.system.__module__}.system",
    )
    assert not (tmp_path / "ran").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.FileSystemReader(folder).read_metadata()  # the reference: torch's reader runs it
    assert (tmp_path / "ran").exists()


def test_a_number_that_needs_code_is_left_out(tmp_path, influence):
    """torch would unpickle such an entry; the weights are read without it."""
    content = {"model": net().state_dict(), "step": Command(f"touch {tmp_path / 'ran'}")}
    folder = save_distributed(tmp_path / "step-9", content)
    assert influence("convert", folder, tmp_path / "to").code == 0
    same_weights(tmp_path / "to" / "step-000009.safetensors", net())
    assert not (tmp_path / "ran").exists()


def outside(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../shard"
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def shorten(folder):
    shard = next(folder.glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-200])


BROKEN = {
    "shards outside": (outside, "names files outside its folder", "found: ../shard"),
    "shards missing": (
        lambda folder: next(folder.glob("*.distcp")).unlink(), "lacks shards", "missing: __0_0.",
    ),
    "a truncated shard": (shorten, "can't be read as a checkpoint", "copy it again"),
    "truncated metadata": (
        lambda folder: (folder / ".metadata").write_bytes(b"\x80\x04}"), "can't be read", "EOFError",
    ),
    "another object": (
        lambda folder: (folder / ".metadata").write_bytes(pickle.dumps([1])),
        "can't be read", "no table of tensors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_are_refused(case, tmp_path, influence):
    damage, *texts = BROKEN[case]
    folder = save_distributed(tmp_path / "step-1", net().state_dict())
    damage(folder)
    refused(influence("convert", folder, tmp_path / "to"), 1, *texts)
