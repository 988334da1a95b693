"""Checkpoints of a real Lightning training: weights, steps and learning rates."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from influence_cli.integrations.convert import convert_lightning
from influence_cli.progress import Reporter

pytest.importorskip("lightning")

RATE = 0.25


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    """4 steps, a checkpoint each second one; and the weights after each step."""
    import lightning

    class Tuned(lightning.LightningModule):
        def __init__(self, width: int, activation: nn.Module):
            super().__init__()
            self.save_hyperparameters()
            self.module = nn.Linear(width, 2)  # a name that DataParallel uses as a prefix
            self.after = {}

        def training_step(self, batch, index):
            return self.module(batch[0]).square().mean()

        def on_train_batch_start(self, batch, index):
            self.remember()

        def on_train_end(self):
            self.remember()

        def remember(self):
            self.after[self.global_step] = {k: v.clone() for k, v in self.state_dict().items()}

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=4)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    folder = tmp_path_factory.mktemp("lightning")
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(8, 3))
    saver = lightning.pytorch.callbacks.ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = lightning.Trainer(
            default_root_dir=folder, max_steps=4, accelerator="cpu", logger=True,
            callbacks=[saver], enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        model = Tuned(3, nn.ReLU())
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=2))
    return trainer.logger.log_dir, model.after


def test_each_ckpt_becomes_the_weights_after_its_step(training, tmp_path, influence):
    """`module.` is a name of the module itself, and stays. The hyperparameters hold a class."""
    folder, after = training
    result = influence("convert", folder, tmp_path / "to", "--placeholders")
    paths = [tmp_path / "to" / f"step-00000{step}.safetensors" for step in (2, 4)]
    assert (result.code, result.out.split()) == (0, list(map(str, paths))), result.err
    for step, path in zip((2, 4), paths, strict=True):
        saved = load_file(path)
        assert saved.keys() == after[step].keys() == {"module.weight", "module.bias"}
        assert all(torch.equal(saved[key], after[step][key]) for key in saved)


def test_the_rate_is_that_of_the_next_step_and_0_is_named(training, tmp_path, influence):
    """The schedule gives steps 0 to 3 the rates 1, 3/4, 1/2 and 1/4 of RATE, and then 0."""
    folder, _ = training
    result = influence("convert", folder, tmp_path / "to", "--placeholders")
    with safe_open(tmp_path / "to" / "step-000002.safetensors", "pt") as file:
        assert float(file.metadata()["learning_rate"]) == pytest.approx(RATE / 2)
    with safe_open(tmp_path / "to" / "step-000004.safetensors", "pt") as file:
        assert "learning_rate" not in file.metadata()
    assert "step=4.ckpt: its learning rate is 0" in result.err


def test_init_can_convert_a_lightning_folder(training, tmp_path):
    folder = Path(training[0])
    files = convert_lightning(folder, tmp_path / "to", Reporter(), placeholders=True)
    assert files == [tmp_path / "to" / f"step-00000{step}.safetensors" for step in (2, 4)]
    assert all(file.is_file() for file in files)
