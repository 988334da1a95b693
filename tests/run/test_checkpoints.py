"""Checkpoints as they are found in the wild: plain folders, Trainer folders, shards, ties, wrappers, and their learning rates."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from influence_cli.errors import CheckpointError, TrajectoryError, UsageProblem
from influence_cli.run import checkpoints
from influence_cli.run.checkpoint_loading import check_fits_model, load_checkpoint
from influence_cli.run.learning_rates import weigh_checkpoints
from influence_cli.run.run import select_steps
from influence_cli.run.trajectory_reader import read_trajectory
from tests.cases import TiedForm


def simple(steps=(10, 20), folder=None, **metadata):
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        torch.manual_seed(step)
        save_file(
            nn.Linear(3, 2).state_dict(),
            folder / f"step-{step:06d}.safetensors",
            metadata={k: str(v) for k, v in metadata.items()},
        )
    return folder


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("step-000100", 100),
        ("checkpoint-7", 7),
        ("model_epoch3_step40", 40),
        ("12", 12),
        ("resnet18-step-5", 5),
    ],
)
def test_the_step_is_the_last_number_in_the_name(name, step, tmp_path):
    save_file(nn.Linear(3, 2).state_dict(), tmp_path / f"{name}.safetensors")
    assert checkpoints.describe_checkpoint(tmp_path / f"{name}.safetensors").step == step


def test_the_step_of_the_metadata_wins_over_a_number_that_is_no_step(tmp_path):
    save_file(
        nn.Linear(3, 2).state_dict(), tmp_path / "resnet18.safetensors", metadata={"step": "500"}
    )
    assert checkpoints.describe_checkpoint(tmp_path / "resnet18.safetensors").step == 500


def test_checkpoints_come_by_rising_step_whatever_their_names(tmp_path):
    simple((1000, 20, 300), tmp_path / "checkpoints")
    assert [c.step for c in checkpoints.find_checkpoints(tmp_path)] == [20, 300, 1000]


def trainer_folder(run, step, sharded=False, rate=None):
    """What a Hugging Face Trainer leaves: checkpoint-N with model files, trainer_state.json and things that are none of ours."""
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    torch.manual_seed(step)
    state = nn.Linear(3, 2).state_dict()
    if sharded:
        weights = {}
        for k, (key, value) in enumerate(state.items()):
            save_file(
                {key: value},
                folder / f"model-0000{k + 1}-of-00002.safetensors",
                metadata={"format": "pt"},
            )
            weights[key] = f"model-0000{k + 1}-of-00002.safetensors"
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": 32}, "weight_map": weights})
        )
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    log = [
        {"step": 5, "loss": 1.0, "learning_rate": 0.5},
        {"step": step, "loss": 1.0, "learning_rate": rate or 1 / step},
        {"step": step, "eval_loss": 2.0},
    ]
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": step, "log_history": log})
    )
    (folder / "optimizer.pt").write_bytes(b"not for us")
    return state


@pytest.mark.parametrize("sharded", [False, True])
def test_trainer_folders_are_read_as_they_are(sharded, tmp_path):
    state = trainer_folder(tmp_path, 100, sharded)
    trainer_folder(tmp_path, 20, sharded)
    (tmp_path / "runs").mkdir()
    found = checkpoints.find_checkpoints(tmp_path)
    assert [c.step for c in found] == [20, 100]
    assert [weight.rates for weight in weigh_checkpoints(found, None)] == [(1 / 20,), (1 / 100,)]
    model = nn.Linear(3, 2)
    check_fits_model(found, model, cast=False)
    load_checkpoint(found[1], model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_a_tied_tensor_saved_once_fills_all_its_names(tmp_path):
    torch.manual_seed(1)
    saved, model = TiedForm(), TiedForm()
    save_model(saved, str(tmp_path / "step-1.safetensors"))
    assert len(load_file(tmp_path / "step-1.safetensors")) == len(saved.state_dict()) - 1
    found = checkpoints.find_checkpoints(tmp_path, tmp_path)
    check_fits_model(found, model, cast=False)
    load_checkpoint(found[0], model)
    assert torch.equal(model.head.weight, saved.embedding.weight)
    assert model.head.weight is model.embedding.weight


def test_two_values_of_one_tied_tensor_are_refused(tmp_path):
    state = {key: value.clone() for key, value in TiedForm().state_dict().items()}
    state["head.weight"] += 1
    save_file(state, tmp_path / "step-1.safetensors")
    found = checkpoints.find_checkpoints(tmp_path, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"two values of one tied tensor\n  embedding.weight and head.weight"
    ):
        load_checkpoint(found[0], TiedForm())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrapper_prefixes_are_taken_off(prefix, tmp_path):
    state = nn.Linear(3, 2).state_dict()
    save_file(
        {prefix + key: value for key, value in state.items()}, tmp_path / "step-1.safetensors"
    )
    model, found = nn.Linear(3, 2), checkpoints.find_checkpoints(tmp_path, tmp_path)
    check_fits_model(found, model, cast=False)
    load_checkpoint(found[0], model)
    assert torch.equal(model.weight, state["weight"])


@pytest.mark.parametrize("key", ["step", "learning_rate"])
@pytest.mark.parametrize("number", ["1_0", " 10", "٣", ""])
def test_metadata_that_is_no_plain_number_is_refused(key, number, tmp_path):
    save_file(
        {"a": torch.zeros(1)},
        tmp_path / "model.safetensors",
        metadata={"step": "10"} | {key: number},
    )
    with pytest.raises(CheckpointError, match=f"metadata {key} is no number"):
        checkpoints.describe_checkpoint(tmp_path / "model.safetensors")


def test_a_step_in_the_name_that_the_metadata_contradicts_is_refused(tmp_path):
    simple((10,), tmp_path, step=11)
    with pytest.raises(CheckpointError, match="has step 10 in its name and 11 in its metadata"):
        checkpoints.find_checkpoints(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("spec", "steps"),
    [
        ("20", [20]),
        ("20:", [20, 30]),
        (":20", [10]),
        ("10:30", [10, 20]),
        ("10,30", [10, 30]),
        ("15:25,30", [20, 30]),
    ],
)
def test_steps_are_chosen_by_step(spec, steps, tmp_path):
    found = tuple(checkpoints.find_checkpoints(tmp_path, simple((10, 20, 30), tmp_path / "c")))
    assert [c.step for c in select_steps(found, spec)] == steps


@pytest.mark.parametrize(
    "spec", ["15", "40:", "x", "1:2:3", "", "1_0", "+10", "-1:20", "10:0", "9" * 5000, "٣"]
)
def test_steps_that_are_not_there_are_refused(spec, tmp_path):
    found = tuple(checkpoints.find_checkpoints(tmp_path, simple((10, 20, 30), tmp_path / "c")))
    with pytest.raises(UsageProblem, match="--steps") as raised:
        select_steps(found, spec)
    assert len(str(raised.value)) < 500


# ---------------------------------------------------------------- learning rates
def line(step, lr, examples=(0,)):
    return json.dumps({"step": step, "lr": lr, "examples": list(examples)}) + "\n"


HEADER = (
    json.dumps(
        {
            "format": "influence-trajectory",
            "version": 1,
            "reduction": "mean",
            "optimizer": {"name": "sgd"},
        }
    )
    + "\n"
)


def test_rates_of_a_trajectory_by_hand(tmp_path):
    """Four steps with the rates 1, 2, 4, 8; checkpoints at 0, 2, 3, 4."""
    (tmp_path / "t.jsonl").write_text(HEADER + "".join(line(step, 2.0**step) for step in range(4)))
    read = read_trajectory(tmp_path / "t.jsonl", 1)
    found = checkpoints.find_checkpoints(
        tmp_path, simple((0, 2, 3, 4), tmp_path / "c", learning_rate=99)
    )
    assert [weight.rates[0] for weight in weigh_checkpoints(found, read, "point")] == [1, 4, 8, 8]
    assert [weight.rates[0] for weight in weigh_checkpoints(found, read, "segment")] == [0, 3, 4, 8]
    assert [weight.rates[0] for weight in weigh_checkpoints(found, read, "none")] == [1, 1, 1, 1]
    assert [weight.rates[0] for weight in weigh_checkpoints(found, read, "point", 0.3)] == [0.3] * 4


def test_a_checkpoint_past_the_trajectory_is_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text(HEADER + line(0, 1.0) + line(1, 1.0))
    found = checkpoints.find_checkpoints(tmp_path, simple((1, 3), tmp_path / "c"))
    with pytest.raises(TrajectoryError, match="ends before c/step-000003"):
        weigh_checkpoints(found, read_trajectory(tmp_path / "t.jsonl", None))


def test_the_later_line_of_a_step_wins_and_a_cut_off_end_costs_one_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        HEADER
        + line(0, 1.0)
        + line(1, 2.0)
        + line(2, 3.0)
        + line(1, 7.0)
        + '{"step": 3, "lr": 0.1, "exa'
    )
    read = read_trajectory(path, 1)
    assert [line.lr for line in read.lines] == [1.0, 7.0, 3.0]
    assert read.steps == 3
    assert "line 6 is cut off" in read.notes[0]


def test_rates_without_trajectory_come_from_the_metadata_then_the_trainer(tmp_path):
    found = checkpoints.find_checkpoints(
        tmp_path, simple((10,), tmp_path / "c", learning_rate=0.25)
    )
    assert weigh_checkpoints(found, None)[0].rates == (0.25,)
    trainer_folder(tmp_path / "run", 8, rate=0.125)
    shutil.copytree(tmp_path / "run" / "checkpoint-8", tmp_path / "run" / "checkpoint-9")
    weights = weigh_checkpoints(checkpoints.find_checkpoints(tmp_path / "run"), None)
    assert [weight.rates for weight in weights] == [(0.125,), (0.125,)]
    assert weights[1].source == "trainer_state.json, logged at step 8"


def test_no_rate_anywhere_names_the_flag(tmp_path):
    found = checkpoints.find_checkpoints(tmp_path, simple((10, 20), tmp_path / "c"))
    with pytest.raises(UsageProblem, match="--lr X gives one"):
        weigh_checkpoints(found, None)
    with pytest.raises(UsageProblem, match="--lr-weights segment needs a trajectory"):
        weigh_checkpoints(found, None, "segment")
