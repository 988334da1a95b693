"""lightning.Recorder: one callback records what a replay needs."""

import json
import logging
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.callbacks import ModelCheckpoint

from influence_cli.errors import TrajectoryError
from influence_cli.lightning import Recorder

MODULE = """
import lightning, torch
from torch import nn
from torch.nn import functional as F

class LitNet(lightning.LightningModule):
    def __init__(self, width=8):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3))

    def training_step(self, batch, index):
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
"""
EXAMPLES = 26


@pytest.fixture(autouse=True)
def quiet():
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


class Module(lightning.LightningModule):
    """That of MODULE."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 3)
        )

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.1, 12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def pictures(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mynet.py").write_text(MODULE)
    generator = np.random.default_rng(0)
    x = {
        s: generator.integers(0, 256, (n, 4, 4), dtype=np.uint8)
        for s, n in (("train", EXAMPLES), ("test", 4))
    }
    y = {s: generator.integers(0, 3, len(x[s])) for s in x}
    np.savez(
        folder / "pictures.npz",
        x_train=x["train"],
        x_test=x["test"],
        y_train=y["train"],
        y_test=y["test"],
    )
    return torch.utils.data.TensorDataset(
        torch.from_numpy(x["train"]).float() / 255, torch.from_numpy(y["train"])
    )


def loader(data, **options):
    torch.manual_seed(0)
    return torch.utils.data.DataLoader(data, batch_size=4, shuffle=True, **options)


def fit(folder, module=None, data=None, recorder=None, ckpt_path=None, callbacks=(), **options):
    torch.manual_seed(1)
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False,
        callbacks=[recorder or Recorder(folder / "run"), *callbacks], **{"max_epochs": 3, "enable_checkpointing": bool(callbacks)} | options,
    )  # fmt: skip
    trainer.fit(
        module or Module(),
        data if data is not None else loader(pictures(folder)),
        ckpt_path=ckpt_path,
    )
    return trainer


def read_lines(folder):
    return [json.loads(line) for line in (folder / "run/trajectory.jsonl").read_text().splitlines()]


RUNS = {
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    "plain": {},
}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_a_recorded_training_is_replayed_and_scored(options, tmp_path, influence, monkeypatch):
    fit(tmp_path, **options)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)  # of another test
    done = influence("init", "run", "--model", "mynet:LitNet", "--data", "pictures.npz")
    assert done.code == 0, done.err
    done = influence("score", "run", "--method", "unroll", "--replay", "--top", 1, "--queries", 0)
    assert done.code == 0, done.err
    assert "replay: it reproduced 3 saved checkpoints" in done.err, done.err
    if "bit for bit" not in done.err:
        assert float(done.err.split("relative distance is ")[1].split(" ")[0]) < 1e-6
    assert len(done.rows) == 2


def test_each_epoch_has_each_example_once(tmp_path):
    fit(tmp_path, accumulate_grad_batches=2, max_epochs=1)
    lines = read_lines(tmp_path)[1:]
    assert sorted(index for line in lines for index in line["examples"]) == list(range(EXAMPLES))
    assert lines[0]["weights"] == [1 / 8] * 8
    assert lines[-1]["weights"] == [1 / 4] * 2  # Lightning divides the only batch by 2, too


def test_batches_that_are_mappings_and_a_datamodule(tmp_path):
    class Mappings(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            return {"x": torch.full((16,), float(index)), "y": index % 3}

    class Data(lightning.LightningDataModule):
        def train_dataloader(self):
            return loader(Mappings())

        def on_before_batch_transfer(self, batch, dataloader_idx):
            assert set(batch) == {"x", "y"}
            return batch["x"], batch["y"]

    fit(tmp_path, data=Data(), max_epochs=1)
    assert sorted(i for line in read_lines(tmp_path)[1:] for i in line["examples"]) == list(
        range(8)
    )


def test_a_sum_of_losses_has_weights_of_1(tmp_path):
    fit(tmp_path, recorder=Recorder(tmp_path / "run", reduction="sum"), max_epochs=1)
    assert read_lines(tmp_path)[1]["weights"] == [1.0] * 4


def test_a_resumed_training_continues_the_recording(tmp_path):
    saver = ModelCheckpoint(
        dirpath=tmp_path / "saved", every_n_epochs=1, save_top_k=-1, filename="{epoch}"
    )
    fit(tmp_path, max_epochs=1, callbacks=[saver])
    fit(tmp_path, max_epochs=2, ckpt_path=tmp_path / "saved/epoch=0.ckpt")
    assert [line["step"] for line in read_lines(tmp_path)[1:]] == list(range(14))


def test_an_interrupted_training_saves_no_checkpoint(tmp_path):
    class Broken(Module):
        def training_step(self, batch, index):
            if index == 2:
                raise ValueError("stop")
            return super().training_step(batch, index)

    with pytest.raises(ValueError, match="stop"):
        fit(tmp_path, Broken())
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == [
        "step-000000.safetensors"
    ]


def test_what_cannot_be_recorded_is_refused(tmp_path):
    module = Module()
    module.automatic_optimization = False
    with pytest.raises(TrajectoryError, match="manual optimization"):
        fit(tmp_path, module)
    with pytest.raises(TrajectoryError, match="clipping by value"):
        fit(tmp_path, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    with pytest.raises(TrajectoryError, match="expected: one torch DataLoader"):
        fit(tmp_path, data={"a": loader(pictures(tmp_path))})
