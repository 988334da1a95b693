"""Checkpoints of other kinds, changed ones and removed ones: named, with what helps; never skipped."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import DEFINITION
from tests.refusals import refused, replaced

FIRST, SECOND = "step-000010.safetensors", "step-000020.safetensors"


def put_folder(run, name, *files):
    folder = run / "checkpoints" / name
    folder.mkdir()
    for file in files:
        (folder / file).write_bytes(b"8 bytes!")
    return folder


KINDS = {
    "peft adapters": ["adapter_model.bin", "adapter_config.json"],
    "torch.distributed shards": ["__0_0.distcp", ".metadata"],
    "pickled files": ["pytorch_model.bin"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_would_be_skipped_is_refused_by_name(kind, make_run, influence):
    files = KINDS[kind]
    run = make_run()
    put_folder(run, "checkpoint-30", *files)
    put_folder(run, "checkpoint-40", *files)
    put_folder(run, "logs-2024", "events.txt", "optimizer.pt")
    text = f"{kind}: checkpoint-30, checkpoint-40"
    place = run / "checkpoints"
    remedy = f"influence convert {place} {place}; then move these folders out"
    refused(influence("score", run), 1, "can't be read, beside others", text, remedy)
    refused(influence("inspect", run), 1, text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_one_unreadable_kind_says_what_helps(kind, make_run, influence):
    files = KINDS[kind]
    run = make_run(steps=())
    put_folder(run, "checkpoint-30", *files)
    text = f"found {kind}: checkpoint-30/"
    command = f"influence convert {run / 'checkpoints'} {run / 'converted'}"
    remedy = f"{command}, then --checkpoints {run / 'converted'}"
    refused(influence("score", run), 1, "no checkpoints in", text, remedy)


def test_the_suggested_conversion_makes_a_trainers_folder_readable(tmp_path, influence):
    """The command of the error, as it is; then the run is read."""
    run = tmp_path / "run"
    (run / "checkpoint-30").mkdir(parents=True)
    (run / "definition.py").write_text(DEFINITION)
    space: dict = {"__name__": "definition_of_a_test"}
    exec(DEFINITION, space)
    torch.save(space["model"]().state_dict(), run / "checkpoint-30" / "pytorch_model.bin")
    torch.save({}, run / "checkpoint-30" / "optimizer.pt")
    result = influence("score", run, "--lr", "0.1")
    refused(result, 1, "found pickled files: checkpoint-30/pytorch_model.bin; pickled files are")
    command = re.search(r"influence convert (\S+) (\S+)$", result.err, re.M)
    assert influence("convert", *command.groups()).code == 0
    assert influence("score", run, "--lr", "0.1").code == 0


def test_the_suggested_conversion_makes_a_lightning_folder_readable(make_run, influence):
    run = make_run()
    folder = run / "lightning_logs" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    state = load_file(run / "checkpoints" / FIRST)
    torch.save({"state_dict": state, "global_step": 10}, folder / "epoch=0-step=10.ckpt")
    shutil.rmtree(run / "checkpoints")
    result = influence("score", run, "--lr", "0.1")
    refused(result, 1, f"influence convert {folder} {run / 'checkpoints'}")
    assert influence("convert", folder, run / "checkpoints").code == 0
    assert influence("score", run, "--lr", "0.1").code == 0


def test_checkpoints_in_another_folder_of_the_run_are_named(make_run, influence):
    run = make_run()
    (run / "checkpoints").rename(run / "saved")
    refused(influence("score", run), 1, "no checkpoints in", f"--checkpoints {run / 'saved'}")
    folder = run / "output" / "checkpoint-20"
    folder.mkdir(parents=True)
    shutil.copy(run / "saved" / SECOND, folder / "model.safetensors")
    refused(influence("score", run), 1, f"--checkpoints {run / 'output'}")


def test_a_checkpoints_own_folder_is_told_of_the_one_above(make_run, influence):
    run = make_run(steps=())
    folder = put_folder(run, "checkpoint-20")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    result = influence("score", run, "--checkpoints", folder)
    refused(result, 1, "no step", f"--checkpoints names the folder above: {run / 'checkpoints'}")


@pytest.mark.parametrize("flags", [(), ("--precision", "float32")])
def test_float8_is_told_to_dequantize_and_not_of_precision(flags, make_run, influence):
    run = make_run()
    path = run / "checkpoints" / SECOND
    content = load_file(path)
    content["0.weight"] = content["0.weight"].to(torch.float8_e4m3fn)
    save_file(content, path, {"step": "20", "learning_rate": "0.1"})
    result = influence("score", run, *flags)
    refused(result, 1, "float8_e4m3fn in the file", "dequantize")
    assert "--precision" not in result.err


def test_a_dtype_that_is_unknown_is_named(make_run, influence):
    run = make_run()
    head = {"0.weight": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}
    text = json.dumps(head).encode()
    content = len(text).to_bytes(8, "little") + text + b"1"
    (run / "checkpoints" / SECOND).write_bytes(content)
    refused(influence("score", run), 1, SECOND, "0.weight has the dtype 'F4', unknown here")


def test_keys_of_an_inner_compiled_module_are_mapped(make_run, influence):
    """torch.compile of a part of the model writes `_orig_mod.` inside its keys."""
    plain, compiled = make_run("plain"), make_run("compiled")
    for name in (FIRST, SECOND):
        path = compiled / "checkpoints" / name
        content = load_file(path)
        keys = {key: key.replace("2.", "2._orig_mod.") for key in content}
        metadata = {"learning_rate": {FIRST: "0.1", SECOND: "0.05"}[name]}
        save_file({keys[key]: value for key, value in content.items()}, path, metadata)
        assert any("_orig_mod" in key for key in load_file(path))
    expected = influence("score", plain)
    assert expected.code == 0
    assert influence("score", compiled).out == expected.out != ""


def test_a_lazy_model_is_told_to_give_sizes(make_run, influence):
    lazy = replaced(DEFINITION, ("nn.Linear(4, 5)", "nn.LazyLinear(5)"))
    run = make_run()
    (run / "definition.py").write_text(lazy)
    refused(influence("score", run), 1, "lazy modules", "0.weight", "give the sizes")


REMOVED = """
def train_data():
    import pathlib, shutil
    file = pathlib.Path(__file__).parent / "checkpoints" / "step-000020.safetensors"
    {change}
    return examples(0, 20)
"""


@pytest.mark.parametrize(
    "change", ["file.unlink(missing_ok=True)", "file.write_bytes(b'12345678' * 9)"]
)
@pytest.mark.parametrize("command", ["score", "self", "cache", "check"])
def test_a_checkpoint_that_vanishes_during_the_work_is_named(change, command, make_run, influence):
    run = make_run()
    text = (run / "definition.py").read_text()
    (run / "definition.py").write_text(text + REMOVED.format(change=change))
    result = influence(command, run)
    assert result.code == 1, result.err
    assert "Traceback" not in result.err
    assert SECOND in result.err


@pytest.mark.parametrize("folder", ["checkpoints", ".influence"])
def test_a_folder_that_vanishes_during_the_work_is_no_trace(folder, make_run, influence):
    run = make_run()
    assert influence("cache", run).code == 0
    text = (run / "definition.py").read_text()
    gone = f"__import__('shutil').rmtree(file.parents[1] / '{folder}', True)"
    (run / "definition.py").write_text(text + REMOVED.format(change=gone))
    result = influence("score", run)
    assert "Traceback" not in result.err
    assert result.code == 0 or (result.code == 1 and "error: " in result.err), result.err


@pytest.mark.parametrize("folder", ["", "checkpoints"])
def test_the_hint_of_an_empty_folder_names_a_place_that_is_read(folder, make_run, influence):
    run = make_run()
    weights = load_file(sorted((run / "checkpoints").iterdir())[0])
    shutil.rmtree(run / "checkpoints")
    (run / folder).mkdir(exist_ok=True)
    result = influence("inspect", run)
    refused(result, 1, "no checkpoints in", "'learning_rate'")
    hinted = Path(re.search(r"save_model\(model, '([^']+)'", result.err)[1])
    hinted.parent.mkdir(exist_ok=True)
    save_file(weights, hinted, {"learning_rate": "0.1"})
    assert influence("inspect", run).code == 0
