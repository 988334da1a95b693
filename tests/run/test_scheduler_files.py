"""Learning rates in a Trainer's scheduler.pt, where trainer_state.json logs none."""

import argparse
import json

import pytest
import torch

from influence_cli.errors import CheckpointError
from influence_cli.run import checkpoints
from influence_cli.run.learning_rates import NoLearningRate, weigh_checkpoints
from tests.run.test_checkpoints import trainer_folder


def silent_folder(run, step, rates):
    """A checkpoint whose trainer_state.json logs no learning rate."""
    trainer_folder(run, step)
    folder = run / f"checkpoint-{step}"
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step}]}))
    torch.save({"last_epoch": step, "_last_lr": rates}, folder / "scheduler.pt")
    return folder


def weights_of(run):
    return weigh_checkpoints(checkpoints.find_checkpoints(run), None)


def test_scheduler_pt_gives_the_rate_where_none_is_logged(tmp_path):
    silent_folder(tmp_path, 10, [0.25, 0.25])
    (silent_folder(tmp_path, 20, [0.125]) / "trainer_state.json").unlink()
    weights = weights_of(tmp_path)
    assert [weight.rates for weight in weights] == [(0.25,), (0.125,)]
    assert weights[0].source == "scheduler.pt, next step"


def test_the_logged_rate_goes_before_that_of_scheduler_pt(tmp_path):
    trainer_folder(tmp_path, 8, rate=0.5)
    torch.save({"_last_lr": [0.25]}, tmp_path / "checkpoint-8" / "scheduler.pt")
    assert weights_of(tmp_path)[0].source == "trainer_state.json, logged at step 8"


def test_a_rate_of_0_at_the_end_of_a_schedule_is_refused_and_named(tmp_path):
    """A linear schedule ends at 0: that is the rate of a step which was never taken."""
    silent_folder(tmp_path, 10, [0.25])
    silent_folder(tmp_path, 20, [0.0])
    with pytest.raises(NoLearningRate) as refusal:
        weights_of(tmp_path)
    assert "no learning rate for " in refusal.value.headline
    assert refusal.value.headline.endswith("checkpoint-20")
    assert "checkpoint-20 has the rate 0: the schedule ended there" in str(refusal.value)
    assert "--lr X" in str(refusal.value)


BROKEN = {
    "several": ({"_last_lr": [0.1, 0.2]}, "has several learning rates"),
    "a class": ({"_last_lr": [0.1], "x": argparse.Namespace()}, "can't be read: UnpicklingError"),
    "text": ({"_last_lr": ["much"]}, "can't be read: ValueError"),
    "below 0": ({"_last_lr": [-1.0]}, "has the learning rate -1"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unusable_rates_are_refused(case, tmp_path):
    content, text = BROKEN[case]
    torch.save(content, silent_folder(tmp_path, 10, []) / "scheduler.pt")
    with pytest.raises(CheckpointError, match=text):
        weights_of(tmp_path)


def test_a_scheduler_without_a_rate_is_no_source(tmp_path):
    silent_folder(tmp_path, 10, [])
    with pytest.raises(NoLearningRate, match=r"trainer_state\.json, scheduler\.pt"):
        weights_of(tmp_path)
