"""A replay ends where the recorded training did; without an example, where retraining ends."""

import numpy as np
import pytest
import torch

from influence_cli import TrajectoryRecorder
from influence_cli.errors import TrajectoryError
from influence_cli.run.replay import DroppedExample, Replay
from influence_cli.run.run import open_run
from tests.refusals import replaced
from tests.training import definition_of, train

GROUPS = (
    {"params": ["0.weight", "0.bias"], "lr": 0.5},
    {"params": ["2.weight", "2.bias"], "weight_decay": 0.1},
)
TRAININGS = {
    "sgd": {},
    "nesterov and weight decay": {
        "options": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
        "rate": 0.05,
    },
    "clipped": {"clip": lambda norm: min(1.0, 0.3 / norm)},
    "groups": {"groups": GROUPS},
    "sum": {"reduction": "sum", "rate": 0.05},
    "weights": {"weights": True},
    "an example twice": {"batches": lambda t: [t % 24, 3, 3]},
}


def opened(folder):
    run = open_run(folder)
    replay = Replay(run, run.train.batch, 3)
    replay.start_from(run.checkpoints[0])
    return run, replay


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
def test_a_replay_ends_where_the_training_did(training, tmp_path):
    run, replay = opened(train(tmp_path / "run", **training))
    replay.advance(12)
    assert replay.relative_distance(run.checkpoints[-1]) < 1e-12


@pytest.mark.parametrize("renormalize", [False, True])
def test_a_dropped_example_is_a_training_without_it(renormalize, tmp_path):
    order = lambda t: [t, (5 * t) % 24, 7, 9]  # noqa: E731
    run, replay = opened(
        train(tmp_path / "run", batches=order, weights=True, options={"momentum": 0.5})
    )
    replay.advance(6)
    here = replay.save_state()
    replay.advance(12, DroppedExample(6, 7, renormalize))
    without_example = replay.save_state().values
    trajectory = replay.trajectory
    weights = np.where(trajectory.lines[6].examples == 7, 0, trajectory.weights(6))
    line = trajectory.lines[6]._replace(
        weights=weights * (trajectory.weights(6).sum() / weights.sum() if renormalize else 1)
    )
    object.__setattr__(trajectory, "lines", (*trajectory.lines[:6], line, *trajectory.lines[7:]))
    replay.start_from(run.checkpoints[0])
    replay.advance(12)
    assert all(
        torch.equal(a, b) for a, b in zip(without_example, replay.save_state().values, strict=True)
    )
    replay.restore(here)
    replay.advance(12)
    assert all(
        torch.equal(a, b) for a, b in zip(without_example, replay.save_state().values, strict=True)
    )


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_adam_is_torchs_own(name, tmp_path):
    folder = train(tmp_path / "run")
    path = folder / "trajectory.jsonl"
    path.write_text(
        replaced(
            path.read_text(),
            ('"name": "sgd"', f'"name": "{name}", "betas": [0.8, 0.9], "weight_decay": 0.1'),
        )
    )
    run, replay = opened(folder)
    replay.advance(12)
    replayed = [value.clone() for value in replay.save_state().values]
    replay.start_from(run.checkpoints[0])
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    optimizer = kind(run.model.module.parameters(), 0.3, betas=(0.8, 0.9), weight_decay=0.1)
    for step, line in enumerate(run.trajectory.lines):
        optimizer.param_groups[0]["lr"] = run.trajectory.rates(step)[0]
        optimizer.zero_grad()
        run.definition.raw("loss")(
            run.model.module, run.train.batch(line.examples)
        ).mean().backward()
        optimizer.step()
    assert (
        max(
            float((a - b).abs().max())
            for a, b in zip(replayed, replay.save_state().values, strict=True)
        )
        < 1e-12
    )


def test_what_cannot_be_run_again_is_refused_by_name(tmp_path):
    folder = train(tmp_path / "run", every=6, options={"momentum": 0.9})
    path, text = folder / "trajectory.jsonl", (folder / "trajectory.jsonl").read_text()
    run = open_run(folder)
    with pytest.raises(TrajectoryError, match="sgd with momentum had a state there"):
        Replay(run, run.train.batch).start_from(run.checkpoints[1])
    for old, new, says in (
        ('"name": "sgd"', '"name": "lion"', "steps of lion can't be run again"),
        ('"momentum": 0.9', '"inertia": 0.9', "SGD refuses these options"),
    ):
        path.write_text(replaced(text, (old, new)))
        with pytest.raises(TrajectoryError, match=says):
            opened(folder)


FLOAT32 = """
import torch
from torch import nn
from torch.nn import functional as F

def model():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(144, 5))

def train_data():
    generator = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(40, 1, 8, 8, generator=generator), torch.randint(0, 5, (40,), generator=generator))

query_data = train_data

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_on_one_thread_a_replay_is_the_training_bit_by_bit(kind, tmp_path):
    """A loop as users write it: float32, the mean loss of 12 examples, recorded by the recorder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "definition.py").write_text(FLOAT32)
    space = definition_of(tmp_path / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        torch.manual_seed(0)
        model, data = space["model"](), space["train_data"]()
        options = {
            "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
            "AdamW": {"lr": 0.01},
        }[kind]
        optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
        with TrajectoryRecorder(
            tmp_path / "run",
            model,
            optimizer,
            checkpoint_every=10,
            reduction="mean",
            save_optimizer=True,
        ) as recorder:
            for _ in range(20):
                indices = torch.randperm(40)[:12]
                images, labels = data[indices]
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images), labels).backward()
                recorder.step(indices)
                optimizer.step()
        run = open_run(tmp_path / "run")
        replay = Replay(run, run.train.batch)
        for first, then in ((0, 1), (1, 2)):
            replay.start_from(run.checkpoints[first])
            replay.advance(run.checkpoints[then].step)
            assert replay.relative_distance(run.checkpoints[then]) == 0
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("key", ["wieghts", "Clip", "sed"])
def test_a_misspelled_key_of_a_line_is_refused(key, tmp_path):
    from influence_cli.run.trajectory_reader import read_line

    line = f'{{"step": 0, "lr": 0.1, "examples": [0], "{key}": 1}}'.encode()
    with pytest.raises(TrajectoryError, match=key):
        read_line(tmp_path / "trajectory.jsonl", 2, line, None, 0)
    own = line.replace(key.encode(), b"epoch")
    assert read_line(tmp_path / "trajectory.jsonl", 2, own, None, 0)[0] == 0
