"""influence convert: what it reads of each format, and what it writes; through the command line."""

import copy
import json
import os
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from tests.conftest import DEFINITION
from tests.refusals import refused


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return {key: text for key, text in file.metadata().items() if "influence" not in key}


def same_weights(path, model):
    saved, state = load_file(path), model.state_dict()
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[key], state[key]) for key in state)


def wrapped(model, **more):
    return {"model_state_dict": model.state_dict(), "step": 30, **more}


def optimizer_state(model, *rates):
    parts = [
        {"params": [p], "lr": rate} for p, rate in zip(model.parameters(), rates, strict=False)
    ]
    return torch.optim.SGD(parts).state_dict()


# ---------------------------------------------------------------- formats
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_a_state_dict_becomes_a_checkpoint_that_score_reads(suffix, make_run, influence):
    """The scores are those of the same weights saved as safetensors, byte by byte."""
    run = make_run("run", DEFINITION, (10,), net)
    expected = influence("score", run, "--lr", "0.1").out
    shutil.rmtree(run / "checkpoints")
    torch.save(net().state_dict(), run / f"epoch_10{suffix}")
    target = run / "checkpoints" / "step-000010.safetensors"
    result = influence("convert", run / f"epoch_10{suffix}", run / "checkpoints")
    assert (result.code, result.out) == (0, f"{target}\n")
    assert influence("score", run, "--lr", "0.1").out == expected != ""


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "module"])
def test_weights_under_a_usual_key_keep_step_and_rate(key, tmp_path, influence):
    model = net()
    content = {key: model.state_dict(), "step": 30, "optimizer": optimizer_state(model, 0.25)}
    torch.save(content, tmp_path / "a.pt")
    assert influence("convert", tmp_path / "a.pt", tmp_path / "to").code == 0
    path = tmp_path / "to" / "step-000030.safetensors"
    same_weights(path, model)
    assert metadata_of(path) == {"step": "30", "learning_rate": "0.25"}


PREFIXES = {
    "module.": lambda key: f"module.{key}",
    "module._orig_mod.": lambda key: f"module._orig_mod.{key}",
    "inner _orig_mod.": lambda key: key.replace("2.", "2._orig_mod."),
    "FSDP": lambda key: f"_fsdp_wrapped_module.{key}".replace(
        "2.", "2._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
}


@pytest.mark.parametrize("wrapper", PREFIXES)
def test_prefixes_of_wrappers_are_removed(wrapper, tmp_path, influence):
    model = net()
    state = {PREFIXES[wrapper](key): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "step_5.pt")
    assert influence("convert", tmp_path / "step_5.pt", tmp_path / "to").code == 0
    same_weights(tmp_path / "to" / "step-000005.safetensors", model)


def test_two_names_that_become_one_without_prefixes_are_refused(tmp_path, influence):
    state = net().state_dict()
    state["_orig_mod.0.bias"] = state["0.bias"] + 1
    torch.save(state, tmp_path / "step_5.pt")
    result = influence("convert", tmp_path / "step_5.pt", tmp_path / "to")
    refused(result, 1, "two tensors for one name", "found twice: 0.bias")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_tensors_are_written_once_and_load_into_a_tied_model(tmp_path, influence):
    from influence_cli.run.checkpoint_loading import check_fits_model, load_checkpoint
    from influence_cli.run.checkpoints import find_checkpoints

    torch.manual_seed(1)
    saved, model = Tied(), Tied()
    torch.save(saved.state_dict(), tmp_path / "step-5.pt")
    result = influence("convert", tmp_path / "step-5.pt", tmp_path / "to")
    assert "tied tensors are written once: head.weight = embedding.weight" in result.err
    assert list(load_file(tmp_path / "to" / "step-000005.safetensors")) == ["embedding.weight"]
    (checkpoint,) = find_checkpoints(tmp_path, tmp_path / "to")
    check_fits_model([checkpoint], model, cast=False)
    load_checkpoint(checkpoint, model)
    assert torch.equal(model.head.weight, saved.embedding.weight)


def trainer_folder(folder, model, step, sharded=False, logs=(), last_rate=None):
    folder.mkdir(parents=True)
    state = model.state_dict()
    if sharded:
        names = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
        keys = list(state)
        for name, part in zip(names, (keys[:2], keys[2:]), strict=True):
            torch.save({key: state[key] for key in part}, folder / name)
        index = {"weight_map": {key: names[key in keys[2:]] for key in keys}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    log = [{"step": step, "loss": 1.0, "learning_rate": rate} for rate in logs]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    if last_rate is not None:
        torch.save({"_last_lr": [last_rate, last_rate]}, folder / "scheduler.pt")
    torch.save({"anything": 1}, folder / "training_args.bin")


def test_a_trainers_folder_of_bin_files_becomes_one_file_a_step(tmp_path, influence):
    """Sharded or not; the rate that trainer_state.json logs, else the one in scheduler.pt."""
    models = {10: net(1), 20: net(2)}
    trainer_folder(tmp_path / "out" / "checkpoint-10", models[10], 10, logs=(0.5,), last_rate=0.4)
    trainer_folder(tmp_path / "out" / "checkpoint-20", models[20], 20, sharded=True, last_rate=0.3)
    result = influence("convert", tmp_path / "out", tmp_path / "to")
    paths = [tmp_path / "to" / f"step-0000{step}.safetensors" for step in (10, 20)]
    assert result.out.split() == [str(path) for path in paths]
    for (step, model), path, rate in zip(models.items(), paths, ("0.5", "0.3"), strict=True):
        same_weights(path, model)
        assert metadata_of(path) == {"step": str(step), "learning_rate": rate}


def test_a_trainers_last_model_beside_its_checkpoints_is_named(tmp_path, influence):
    """It has no step in its name, and does not hide the checkpoints."""
    trainer_folder(tmp_path / "out", net(2), 20)
    trainer_folder(tmp_path / "out" / "checkpoint-10", net(1), 10)
    trainer_folder(tmp_path / "out" / "best", net(1), 10)
    result = influence("convert", tmp_path / "out", tmp_path / "to")
    assert result.out == f"{tmp_path / 'to' / 'step-000010.safetensors'}\n"
    skipped = f"for want of a step: {tmp_path / 'out'}, {tmp_path / 'out' / 'best'}"
    assert skipped in result.err
    same_weights(tmp_path / "to" / "step-000010.safetensors", net(1))


def test_a_file_of_a_folder_stands_for_the_folder(tmp_path, influence):
    trainer_folder(tmp_path / "checkpoint-10", net(), 10, logs=(0.5,), sharded=True)
    for name in ("pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"):
        result = influence("convert", tmp_path / "checkpoint-10" / name, tmp_path / "to")
        assert result.out == f"{tmp_path / 'to' / 'step-000010.safetensors'}\n"
    same_weights(tmp_path / "to" / "step-000010.safetensors", net())


def test_a_rate_of_0_is_named_and_not_written(tmp_path, influence):
    trainer_folder(tmp_path / "checkpoint-10", net(), 10, last_rate=0.0)
    result = influence("convert", tmp_path / "checkpoint-10", tmp_path / "to")
    assert "checkpoint-10: its learning rate is 0" in result.err
    assert metadata_of(tmp_path / "to" / "step-000010.safetensors") == {"step": "10"}


def test_groups_with_several_rates_are_named_and_none_is_written(tmp_path, influence):
    model = net()
    content = wrapped(model, optimizer_state_dict=optimizer_state(model, 0.1, 0.2))
    torch.save(content, tmp_path / "a.pt")
    result = influence("convert", tmp_path / "a.pt", tmp_path / "to")
    assert "parameter groups have the learning rates 0.1, 0.2" in result.err
    assert metadata_of(tmp_path / "to" / "step-000030.safetensors") == {"step": "30"}


def test_an_adapter_bin_keeps_peft_s_names_and_config(tmp_path, influence):
    folder = tmp_path / "out" / "checkpoint-7"
    folder.mkdir(parents=True)
    state = {"base_model.model.head.lora_A.weight": torch.ones(2, 3)}
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    assert influence("convert", tmp_path / "out", tmp_path / "to").code == 0
    target = tmp_path / "to" / "checkpoint-7"
    assert load_file(target / "adapter_model.safetensors").keys() == state.keys()
    assert (target / "adapter_config.json").read_text() == '{"peft_type": "LORA"}'
    (folder / "adapter_config.json").unlink()
    shutil.rmtree(tmp_path / "to")
    result = influence("convert", tmp_path / "out", tmp_path / "to")
    refused(result, 1, "checkpoint-7 has no adapter_config.json")


def test_an_adapter_in_safetensors_needs_no_conversion(tmp_path, influence):
    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    result = influence("convert", folder, tmp_path / "to")
    refused(result, 2, "is a safetensors file already", "--base DIR merges them")


# ---------------------------------------------------------------- steps
def test_a_step_that_no_name_and_no_content_gives_is_asked_for(tmp_path, influence):
    model = net()
    torch.save(model.state_dict(), tmp_path / "best.pt")
    result = influence("convert", tmp_path / "best.pt", tmp_path / "to")
    command = f"influence convert {tmp_path / 'best.pt'} {tmp_path / 'to'}/step-000100.safetensors"
    refused(result, 1, "the step of", "is unknown", command)
    result = influence(*command.split()[1:])
    assert (result.code, result.out) == (0, f"{tmp_path / 'to'}/step-000100.safetensors\n")
    assert metadata_of(tmp_path / "to" / "step-000100.safetensors")["step"] == "100"


def test_an_epoch_orders_checkpoints_that_have_nothing_else(tmp_path, influence):
    torch.save({"model": net().state_dict(), "epoch": 3}, tmp_path / "best.pt")
    result = influence("convert", tmp_path / "best.pt", tmp_path / "to")
    assert result.out.endswith("step-000003.safetensors\n")
    assert "its epoch, 3, stands for the step" in result.err


def test_two_steps_of_one_checkpoint_are_refused(tmp_path, influence):
    torch.save(wrapped(net()), tmp_path / "step-31.pt")
    result = influence("convert", tmp_path / "step-31.pt", tmp_path / "to")
    refused(result, 1, "has two steps", "content says step 30; its name says step 31")
    target = tmp_path / "to" / "step-000032.safetensors"
    result = influence("convert", tmp_path / "step-31.pt", target)
    refused(result, 1, "has two steps", "TO says step 32", "name the right one")
    target = tmp_path / "to" / "step-000031.safetensors"
    assert influence("convert", tmp_path / "step-31.pt", target).out == f"{target}\n"
    assert metadata_of(target)["step"] == "31"


def test_two_checkpoints_of_one_step_must_be_the_same(tmp_path, influence):
    (tmp_path / "from").mkdir()
    for name in ("epoch=0-step=30.ckpt", "last.ckpt"):
        torch.save(wrapped(net()), tmp_path / "from" / name)
    assert influence("convert", tmp_path / "from", tmp_path / "to").code == 0
    torch.save(wrapped(net(1)), tmp_path / "from" / "last.ckpt")
    result = influence("convert", tmp_path / "from", tmp_path / "other")
    refused(result, 1, "have the step 30 and differ", "last.ckpt", "other values: 0.weight")


# ---------------------------------------------------------------- files that exist
def test_the_same_command_skips_files_that_exist_and_writes_the_missing(tmp_path, influence):
    (tmp_path / "from").mkdir()
    for step in (1, 2):
        torch.save(net(step).state_dict(), tmp_path / "from" / f"step-{step}.pt")
    first = influence("convert", tmp_path / "from", tmp_path / "to")
    paths = sorted((tmp_path / "to").iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    paths[1].unlink()
    again = influence("convert", tmp_path / "from", tmp_path / "to")
    assert (again.code, again.out) == (0, first.out)
    assert f"{paths[0]} is there already, and the same" in again.err
    assert paths[0].stat().st_mtime_ns == times[0]
    assert paths[1].is_file()


def test_a_file_with_other_content_is_never_overwritten(tmp_path, influence):
    (tmp_path / "to").mkdir()
    target = tmp_path / "to" / "step-000001.safetensors"
    save_model(net(5), str(target), {"step": "1"})
    content = target.read_bytes()
    torch.save(net().state_dict(), tmp_path / "step-1.pt")
    result = influence("convert", tmp_path / "step-1.pt", tmp_path / "to")
    refused(result, 1, f"{target} is there already, with other content", "other values", "delete")
    assert target.read_bytes() == content


# ---------------------------------------------------------------- broken inputs
BROKEN = {
    "no such file": (lambda path: None, 2, "no file or folder at"),
    "empty": (lambda path: path.write_bytes(b""), 1, "it is empty (0 bytes)"),
    "text": (lambda path: path.write_text("weights"), 1, "can't be read as a file of torch.save"),
    "no weights": (lambda path: torch.save({"step": 1}, path), 1, "holds no weights"),
    "a list": (lambda path: torch.save([1], path), 1, "found: list; expected: a dict of tensors"),
    "two models": (
        lambda path: torch.save({k: net().state_dict() for k in ("model", "state_dict")}, path),
        1, "holds several models: state_dict, model",
    ),
    "no tensor": (
        lambda path: torch.save({"a": torch.ones(1), "b": "text"}, path), 1, "found: b (str)",
    ),
    "sparse": (
        lambda path: torch.save({"a": torch.ones(2, 2).to_sparse()}, path), 1, "a (a sparse,",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(case, tmp_path, influence):
    write, code, text = BROKEN[case]
    write(tmp_path / "step-1.pt")
    refused(influence("convert", tmp_path / "step-1.pt", tmp_path / "to"), code, text)
    assert not (tmp_path / "to").exists()


def test_files_without_weights_are_refused(tmp_path, influence):
    save_model(net(), str(tmp_path / "step-1.safetensors"))
    result = influence("convert", tmp_path / "step-1.safetensors", tmp_path / "to")
    refused(result, 2, "is a safetensors file already", "put it into RUN/checkpoints")
    torch.save({}, tmp_path / "optimizer.pt")
    result = influence("convert", tmp_path / "optimizer.pt", tmp_path / "to")
    refused(result, 2, "holds no weights", "--run RUN converts the state of an optimizer")


def test_a_truncated_file_is_refused(tmp_path, influence):
    path = tmp_path / "step-1.pt"
    torch.save(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])
    refused(influence("convert", path, tmp_path / "to"), 1, "can't be read as a file of torch.save")


def test_folders_without_checkpoints_say_what_is_expected(tmp_path, influence):
    (tmp_path / "from").mkdir()
    torch.save({}, tmp_path / "from" / "optimizer.pt")
    result = influence("convert", tmp_path / "from", tmp_path / "to")
    refused(result, 2, "holds no checkpoint that needs converting", ".distcp")
    save_model(net(), str(tmp_path / "from" / "step-1.safetensors"))
    result = influence("convert", tmp_path / "from", tmp_path / "to")
    refused(result, 2, "these are safetensors, which influence reads", "step-1.safetensors")


def test_a_file_name_for_several_checkpoints_is_refused(tmp_path, influence):
    (tmp_path / "from").mkdir()
    for step in (1, 2):
        torch.save(net().state_dict(), tmp_path / "from" / f"step-{step}.pt")
    result = influence("convert", tmp_path / "from", tmp_path / "step-1.safetensors")
    refused(result, 2, "TO names one file", "holds 2 checkpoints")


INDEXES = {
    "no map": ("{}", "can't be read: KeyError 'weight_map'"),
    "absent shard": ('{"weight_map": {"0.bias": "absent.bin"}}', "missing: absent.bin"),
    "outside": ('{"weight_map": {"0.bias": "../x.bin"}}', "missing: ../x.bin"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_broken_index_is_refused(case, tmp_path, influence):
    text, message = INDEXES[case]
    trainer_folder(tmp_path / "checkpoint-3", net(), 3, sharded=True)
    torch.save({}, tmp_path / "x.bin")
    (tmp_path / "checkpoint-3" / "pytorch_model.bin.index.json").write_text(text)
    refused(influence("convert", tmp_path / "checkpoint-3", tmp_path / "to"), 1, message)


def test_a_full_disk_names_the_file_and_keeps_the_others(tmp_path, influence, monkeypatch):
    torch.save(net().state_dict(), tmp_path / "step-1.pt")

    def full(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    result = influence("convert", tmp_path / "step-1.pt", tmp_path / "to")
    refused(result, 1, "can't be written: the disk is full", "finished files are kept")
    assert not list((tmp_path / "to").iterdir())


def test_base_and_run_exclude_each_other(tmp_path, influence):
    result = influence("convert", tmp_path, tmp_path, "--run", tmp_path, "--base", tmp_path)
    refused(result, 2, "--run converts optimizer states", "give one of them")


def test_base_without_adapters_is_refused(tmp_path, influence):
    torch.save(copy.deepcopy(net().state_dict()), tmp_path / "step-1.pt")
    result = influence("convert", tmp_path / "step-1.pt", tmp_path / "to", "--base", tmp_path)
    refused(result, 2, "--base merges adapters", "leave --base out")


def test_readable_checkpoints_beside_others_are_named(tmp_path, influence):
    (tmp_path / "from").mkdir()
    torch.save(net().state_dict(), tmp_path / "from" / "step-1.pt")
    save_model(net(), str(tmp_path / "from" / "step-2.safetensors"))
    result = influence("convert", tmp_path / "from", tmp_path / "to")
    assert result.out == f"{tmp_path / 'to' / 'step-000001.safetensors'}\n"
    assert "step-2.safetensors in" in result.err
