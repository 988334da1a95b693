"""Every stored byte is compared with a checksum, and a file from another place is refused."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from influence_cli.cache import identity, verification
from influence_cli.errors import CheckpointError, TrajectoryError
from influence_cli.run import loaded_model
from influence_cli.run.checkpoint_loading import load_checkpoint
from influence_cli.run.checkpoints import find_checkpoints
from influence_cli.run.optimizer_state import read_state, state_path
from influence_cli.run.recorder import TrajectoryRecorder
from influence_cli.storage.safetensors_io import TensorFile, write_tensors
from tests.refusals import refused


@pytest.fixture
def run(make_run):
    return make_run()


def unit_files(run, split="train"):
    return sorted((run / ".influence").rglob(f"{split}/**/*.safetensors"))


def flip(path, position, bit=0):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool], ids=str)
def test_every_flipped_bit_of_a_file_is_found(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": (torch.rand(5, 3) * 9).to(dtype), "b": torch.arange(4), "empty": torch.empty(0)}
    write_tensors(path, tensors, {"key": "value"})
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    missed = []
    for position in [*range(400), *range(400, head, 97), *range(head, len(whole))]:
        for bit in (0, 3, 7):
            flip(path, position, bit)
            try:
                with TensorFile(path) as file:
                    file.verify(file.read(file.entries))
                    missed.append((position, bit))
            except ValueError:
                pass
            path.write_bytes(whole)
    assert missed == []
    with TensorFile(path) as file:
        again = file.read(file.entries)
        file.verify(again)
        assert all(torch.equal(again[name], tensors[name]) for name in tensors)


FLAGS = {"dense": [], "int8": ["--store", "int8"], "projected": ["--project", "4"]}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("split", ["train", "query"])
def test_score_and_check_find_a_flip_anywhere_in_a_unit(flags, split, run, influence):
    flags = [*flags, "--device", "cpu"]
    assert influence("score", run, *flags).code == 0
    path = unit_files(run, split)[0]
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    rng = np.random.default_rng(0)
    for position in (9, head // 2, head, len(whole) - 1, *rng.integers(head, len(whole), 3)):
        flip(path, int(position), int(rng.integers(8)))
        refused(influence("score", run, "--verify", *flags), 1, "damaged")
        assert "damaged" in influence("check", run, *flags).err
        path.write_bytes(whole)
    assert influence("check", run, *flags).code == 0


@pytest.mark.parametrize("place", ["checkpoint", "split", "columns", "projection"])
def test_a_unit_from_another_place_is_refused(place, run, influence):
    assert influence("score", run).code == 0
    if place == "columns":
        assert influence("cache", run, "--layers", "0.weight", "--train", "0:4").code == 0
    if place == "projection":
        for seed in ("1", "2"):
            assert influence("cache", run, "--project", "4", "--seed", seed).code == 0
    files = unit_files(run)
    target = files[0] if place != "projection" else next(p for p in files if "sketch" in str(p))
    others = {
        "checkpoint": [
            p for p in files if p.name == target.name and p.parts[-4] != target.parts[-4]
        ],
        "split": unit_files(run, "query"),
        "columns": [p for p in files if p.parent.name != target.parent.name],
        "projection": [
            p for p in files if p.name == target.name and p.parts[-5] != target.parts[-5]
        ],
    }
    if not others[place]:
        pytest.skip(f"this run has no other {place}")
    shutil.copy(others[place][-1], target)
    flags = ["--project", "4", "--seed", "1"] if place == "projection" else []
    result = influence("check", run, *flags)
    assert result.code == 1
    assert "it belongs to" in result.out


def test_swapped_units_of_two_checkpoints_are_refused_by_score(run, influence):
    assert influence("score", run).code == 0
    first, *_, last = unit_files(run)
    shutil.move(first, first.with_suffix(".other"))
    shutil.move(last, first)
    shutil.move(first.with_suffix(".other"), last)
    refused(influence("score", run), 1, "damaged", "it belongs to")


def test_a_changed_list_of_columns_is_refused(run, influence):
    assert influence("score", run).code == 0
    listing = unit_files(run)[0].with_name("columns.json")
    content = json.loads(listing.read_text())
    columns = [name.replace("weight", "wejght") for name in content["columns"]]
    listing.write_text(json.dumps(content | {"columns": columns}))
    refused(influence("score", run), 1, "columns.json can't be read: it differs from its checksum")
    del content["crc32"]
    listing.write_text(json.dumps(content | {"columns": columns}))
    refused(influence("score", run), 1, "columns.json is damaged")
    listing.write_text(json.dumps(content))  # a cache of an earlier version has no checksum here
    assert influence("score", run).code == 0


def test_what_is_not_compared_is_said(run, influence, monkeypatch):
    assert influence("score", run).code == 0
    monkeypatch.setattr(verification, "SHARE", 0.0)
    noted = influence("score", run)
    assert "were not compared with their checksums; --verify compares all" in noted.err
    assert noted.out == influence("score", run, "--verify").out
    assert "checksums" not in influence("score", run, "--verify").err


def test_a_few_rows_of_a_small_file_are_compared(run, influence):
    assert influence("score", run).code == 0
    assert "not compared" not in influence("score", run, "--queries", "0", "--train", "3").err


def edited_after_caching_one_layer(run, influence):
    """A definition that changed after the cache got one layer, of which a bit is flipped. The flip
    is smaller than rounding, so comparing gradients does not find it."""
    assert influence("cache", run, "--layers", "0.weight").code == 0
    (run / "definition.py").write_text((run / "definition.py").read_text() + "# edited\n")
    for path in unit_files(run):
        with TensorFile(path) as file:
            flip(path, next(s.start for name, s in file.entries.items() if name.endswith(":left")))


def test_verify_compares_what_is_read_to_compare_definitions(run, influence, monkeypatch):
    edited_after_caching_one_layer(run, influence)
    monkeypatch.setattr(verification, "SHARE", 0.0)
    refused(influence("score", run, "--layers", "2.weight", "--verify"), 1, "damaged", "left")


@pytest.mark.parametrize(
    ("command", "remedy"),
    [("score", "--verify"), ("self", "--verify"), ("cache", "influence check")],
)
def test_what_is_read_to_compare_definitions_is_in_the_note(
    command, remedy, run, influence, monkeypatch
):
    edited_after_caching_one_layer(run, influence)
    monkeypatch.setattr(verification, "SHARE", 0.0)
    result = influence(command, run, "--layers", "2.weight")
    assert result.code == 0, result.err
    assert f"were not compared with their checksums; {remedy} compares all" in result.err


def test_a_checkpoint_replaced_with_the_same_size_and_time_is_noticed(run, influence):
    before = influence("score", run)
    first, second, *_ = sorted((run / "checkpoints").iterdir())
    state = first.stat()
    replacement = first.with_suffix(".new")
    content = bytearray(first.read_bytes())
    content[-40:] = second.read_bytes()[-40:]
    replacement.write_bytes(content)
    os.utime(replacement, ns=(state.st_atime_ns, state.st_mtime_ns))
    os.replace(replacement, first)
    assert (first.stat().st_size, first.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    after = influence("score", run)
    assert after.code == 0, after.err
    assert after.out != before.out
    assert after.out == influence("score", run, "--cache", run / "other").out


def test_a_checkpoint_replaced_while_the_command_runs_is_refused(run, influence, monkeypatch):
    fresh = influence("score", run, "--cache", run / "other")
    first, second = sorted((run / "checkpoints").iterdir())
    kept, load = second.read_bytes(), loaded_model.load_checkpoint

    def replace_and_load(checkpoint, module):
        if checkpoint.path == second:
            replacement = second.with_suffix(".new")
            replacement.write_bytes(kept[:-40] + first.read_bytes()[-40:])
            os.replace(replacement, second)
        load(checkpoint, module)

    monkeypatch.setattr(loaded_model, "load_checkpoint", replace_and_load)
    refused(influence("score", run), 1, f"{second.name} was replaced while the command ran")
    monkeypatch.undo()
    second.write_bytes(kept)
    assert influence("score", run).out == fresh.out


def test_flips_in_recorded_checkpoints_and_optimizer_states_are_found(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    recorder = TrajectoryRecorder(tmp_path, model, optimizer, save_optimizer=True)
    with recorder:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        recorder.step([0])
    checkpoint = find_checkpoints(tmp_path)[-1]
    files = {
        checkpoint.path: (CheckpointError, lambda: load_checkpoint(checkpoint, model)),
        state_path(tmp_path, checkpoint.step): (
            TrajectoryError,
            lambda: read_state(state_path(tmp_path, checkpoint.step), "adam"),
        ),
    }
    for path, (kind, load) in files.items():
        whole = path.read_bytes()
        load()
        head = 8 + int.from_bytes(whole[:8], "little")
        for position in range(head, len(whole)):
            flip(path, position)
            with pytest.raises(kind, match="differs from its checksum"):
                load()
            path.write_bytes(whole)


def test_verify_without_a_cache_is_refused(run, influence):
    refused(influence("score", run, "--cache", "none", "--verify"), 2, "--verify has nothing")


def test_a_checkpoint_that_changed_on_disk_is_found_though_its_times_did_not(run, influence):
    """A disk flips a bit and no time stamp: the cache knows the file by another digest."""
    table = influence("score", run).out
    memory = run / ".influence" / "checkpoints.json"
    path = sorted((run / "checkpoints").iterdir())[0]
    whole = path.read_bytes()
    for at in (len(whole) - 3, whole.index(b"0.1") + 2):  # of a tensor, of the learning rate
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        keep_time_stamps(memory, path)
        refused(influence("score", run, "--verify"), 1, path.name, "is damaged", "copy it again")
        checked = influence("check", run)
        assert checked.code == 1
        assert "its time stamps did not" in checked.err
    path.write_bytes(whole)
    keep_time_stamps(memory, path)
    assert influence("score", run, "--verify").out == table
    assert influence("check", run).code == 0


def keep_time_stamps(memory, path):
    """Enter the file's digests under its present state."""
    known = json.loads(memory.read_text())
    (old,) = (key for key in known if key.startswith(f"{path.resolve()}:"))
    digests = known.pop(old)
    known.pop("crc32", None)
    memory.write_text(json.dumps(known | {identity.describe_state(path): digests}))


def test_digests_of_an_older_cache_are_computed_again(run, influence):
    table = influence("score", run).out
    memory = run / ".influence" / "checkpoints.json"
    known = json.loads(memory.read_text())
    known.pop("crc32", None)
    old = {key: digests.partition("-")[0] for key, digests in known.items()}
    for content in (old, {key: [7] for key in known}):
        memory.write_text(json.dumps(content))
        assert influence("score", run, "--verify").out == table
        again = json.loads(memory.read_text())
        assert {key: again[key] for key in known} == known
