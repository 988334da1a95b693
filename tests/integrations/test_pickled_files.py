"""Hostile and unusual pickles: nothing of them is imported or run, with --placeholders or without."""

import argparse
import collections
import os
import pickle
import sys
import zipfile

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from influence_cli.errors import CheckpointError
from influence_cli.integrations.inert_pickle import InertObject, read_inert
from influence_cli.integrations.pickled_files import list_refused_classes, read_pickled
from tests.refusals import refused


class Command:
    """Pickles as a call of os.system."""

    def __init__(self, text):
        self.text = text

    def __reduce__(self):
        return os.system, (self.text,)


@pytest.fixture
def module_with_side_effect(tmp_path, monkeypatch):
    """A module whose import writes a file, and an object of its class. It is not imported now."""
    (tmp_path / "booby_trap.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w').close()\nclass Settings: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import booby_trap

    settings = booby_trap.Settings()
    settings.width = 3
    yield settings
    sys.modules.pop("booby_trap", None)


def hostile_file(tmp_path, settings):
    """A checkpoint with a command and with an object of the module, which is then forgotten."""
    path = tmp_path / "step-1.pt"
    weights = {"weight": torch.arange(6.0).reshape(2, 3).T, "bias": torch.ones(3)}
    command = Command(f"touch {tmp_path / 'ran'}")
    torch.save({"model": weights, "settings": settings, "extra": [command]}, path)
    sys.modules.pop("booby_trap")
    (tmp_path / "imported").unlink()
    return path, weights


def test_no_code_of_a_hostile_file_runs(tmp_path, module_with_side_effect, influence):
    """Without --placeholders it is refused by the names of its classes; with it, read without them."""
    path, weights = hostile_file(tmp_path, module_with_side_effect)
    result = influence("convert", path, tmp_path / "to")
    names = f"{os.system.__module__}.system"
    refused(result, 1, "booby_trap.Settings", names, "--placeholders", "imports and runs nothing")
    result = influence("convert", path, tmp_path / "to", "--placeholders")
    assert result.code == 0, result.err
    saved = load_file(tmp_path / "to" / "step-000001.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)
    assert "booby_trap" not in sys.modules
    assert not (tmp_path / "imported").exists()
    assert not (tmp_path / "ran").exists()


def test_the_trap_works_where_it_is_opened(tmp_path, module_with_side_effect):
    """The reference: a plain unpickling of the same file does import and run."""
    path, _ = hostile_file(tmp_path, module_with_side_effect)
    torch.load(path, weights_only=False)
    assert (tmp_path / "imported").exists()
    assert (tmp_path / "ran").exists()


def raw_file(path, pickled, **records):
    """A file in torch.save's format with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return path


OPCODES = {
    "a call of an inert class": b"cbooby\nrun\n(S'x'\ntR.",
    "a call of its result": b"cbooby\nrun\n(S'x'\ntR(tR.",
    "an old-style instance": b"(S'x'\nibooby\nRun\n.",
    "a name on the stack": b"\x80\x04\x8c\x05booby\x8c\x03run\x93)R.",
    "getattr": b"cbuiltins\ngetattr\n(cbooby\nrun\nS'__globals__'\ntR.",
}


@pytest.mark.parametrize("case", OPCODES)
def test_every_way_to_call_makes_an_inert_object(case, tmp_path):
    content, names = read_inert(raw_file(tmp_path / "a.pt", OPCODES[case]))
    assert isinstance(content, InertObject)
    assert any(name.startswith("booby.") for name in names)


REFUSED = {
    "attributes of a function": (
        b"ctorch._utils\n_rebuild_parameter\n}S'__code__'\nK\x01sb.", "sets attributes",
    ),
    "a tensor outside its storage": (
        b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n"
        b"K\x02tQK\x00(K\x64tp0\n(K\x01tI00\nNtR.", "RuntimeError",
    ),
    "a file outside": (b"(S'file'\nS'/etc/passwd'\ntQ.", "outside it"),
    "a storage that is absent": (
        b"(S'storage'\nctorch\nFloatStorage\nS'../../x'\nS'cpu'\nK\x02tQ.", "KeyError",
    ),
    "deep nesting": (b"(" * 10 + b"R.", "Error"),
    "no end": (b"\x80\x02}", "EOFError"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_impossible_pickles_are_refused(case, tmp_path):
    pickled, text = REFUSED[case]
    path = raw_file(tmp_path / "a.pt", pickled, **{"data/0": b"12345678"})
    with pytest.raises(ValueError, match=text):
        read_inert(path)
    with pytest.raises(CheckpointError, match="can't be read"):
        read_pickled(path, placeholders=True)


def test_placeholders_read_every_dtype_and_shared_storages(tmp_path):
    """Against torch.load, bit by bit."""
    base = torch.arange(12.0)
    tensors = {
        str(dtype): torch.arange(4).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8,
                      torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn)
    } | {"view": base[2:8].view(2, 3), "base": base, "turned": base.view(3, 4).T,
         "empty": torch.empty(0, 3), "parameter": nn.Parameter(torch.ones(2)),
         "scalar": torch.tensor(2.5)}  # fmt: skip
    torch.save({"tensors": tensors, "x": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    torch.save(tensors, tmp_path / "b.pt")
    read = read_pickled(tmp_path / "a.pt", placeholders=True)["tensors"]
    expected = torch.load(tmp_path / "b.pt", weights_only=True)
    for key, value in expected.items():
        assert read[key].dtype == value.dtype, key
        assert read[key].shape == value.shape, key
        assert torch.equal(read[key].float(), value.float()), key
    assert read["view"].data_ptr() == read["base"].data_ptr() + 8


class Settings(dict):
    """A dict of its own class, as trainers use for options."""


def test_kinds_of_dicts_keep_their_items(tmp_path):
    weights = Settings(weight=torch.ones(2))
    counts = collections.defaultdict(list, {"a": [1]})
    torch.save({"model": weights, "counts": counts}, tmp_path / "a.pt")
    content = read_pickled(tmp_path / "a.pt", placeholders=True)
    assert torch.equal(content["model"].items["weight"], torch.ones(2))
    assert content["counts"].items == {"a": [1]}


def test_a_pickled_module_gives_its_parameters_and_buffers(tmp_path, influence):
    """torch.save(model): the class is not imported, the weights are those of its state dict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_buffer("scratch", torch.ones(1), persistent=False)
    torch.save(model, tmp_path / "step-4.pt")
    result = influence("convert", tmp_path / "step-4.pt", tmp_path / "to")
    refused(result, 1, "torch.nn.modules.linear.Linear", "--placeholders")
    assert influence("convert", tmp_path / "step-4.pt", tmp_path / "to", "--placeholders").code == 0
    saved, state = load_file(tmp_path / "to" / "step-000004.safetensors"), model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def test_classes_that_torch_reads_are_not_listed(tmp_path):
    content = {"a": torch.ones(2).to_sparse(), "b": collections.Counter("ab"), "c": {1, 2},
               "d": nn.Parameter(torch.ones(1)), "e": argparse.Namespace()}  # fmt: skip
    torch.save(content, tmp_path / "a.pt")
    assert list_refused_classes(tmp_path / "a.pt") == ["argparse.Namespace"]


def test_a_file_of_an_old_torch_is_read_without_placeholders_only(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_pickled(path)["w"], torch.ones(2))
    torch.save({"w": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"found: argparse\.Namespace"):
        read_pickled(path)
    with pytest.raises(CheckpointError, match="only files of torch"):
        read_pickled(path, placeholders=True)


def test_numbers_of_another_byte_order_are_refused(tmp_path):
    path = raw_file(tmp_path / "a.pt", pickle.dumps({}), byteorder=b"big")
    with pytest.raises(ValueError, match="big-endian"):
        read_inert(path)


def test_a_pickle_of_another_protocol_is_read_with_placeholders(tmp_path):
    state = {"w": torch.arange(3.0)}
    torch.save(state, tmp_path / "a.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="add --placeholders"):
        read_pickled(tmp_path / "a.pt")
    assert torch.equal(read_pickled(tmp_path / "a.pt", placeholders=True)["w"], state["w"])
