"""A Lightning run from its .ckpt files to the table; losses of each example by training_step()."""

import sys

import numpy as np
import pytest
import torch

from influence_cli import open_run
from influence_cli.errors import DefinitionError
from influence_cli.integrations.lightning_task import LightningTask, needs_one_by_one
from tests.integrations import hf_runs
from tests.refusals import refused


@pytest.fixture(scope="module")
def lightning_run(tmp_path_factory):
    return hf_runs.lightning_net(tmp_path_factory.mktemp("lightning"))


@pytest.fixture(autouse=True)
def separate_modules(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mynet", "nets"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_init_and_score_agree_with_training_step_alone(lightning_run, influence, monkeypatch):
    monkeypatch.chdir(lightning_run)
    version = "lightning_logs/version_0"
    result = influence("init", version, "--model", "mynet:LitNet", "--data", "pictures.npz")
    assert result.code == 0, result.err
    assert "CHANGE scale" in result.err
    result = influence("score", version, "--top", "all")
    assert result.code == 0, result.err
    scores = torch.zeros(4, 24)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] = float(row["score"])

    import mynet  # the user's, as init found it

    arrays = np.load("pictures.npz")
    expected = torch.zeros(4, 24)
    saved = sorted((lightning_run / version / "checkpoints").glob("*.ckpt"))
    assert saved
    for path in saved:
        checkpoint = torch.load(path, weights_only=True)
        model = mynet.LitNet(**checkpoint["hyper_parameters"]).eval()
        model.load_state_dict(checkpoint["state_dict"])
        model.log = lambda *values: None

        def gradient(pixels, label):
            batch = torch.from_numpy(pixels[None]).float() / 255, torch.tensor([int(label)])
            grads = torch.autograd.grad(model.training_step(batch, 0), list(model.parameters()))  # noqa: B023
            return torch.cat([grad.flatten() for grad in grads])

        train = torch.stack(
            [gradient(*pair) for pair in zip(arrays["x_train"], arrays["y_train"], strict=True)]
        )
        query = torch.stack(
            [gradient(*pair) for pair in zip(arrays["x_test"], arrays["y_test"], strict=True)]
        )
        expected += checkpoint["optimizer_states"][0]["param_groups"][0]["lr"] * query @ train.T
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    matrix = open_run(version).score(top="all").matrix()
    assert torch.equal(torch.from_numpy(matrix).float(), scores)
    check = influence("check", version, "--queries", "0:2")
    assert check.code == 0, check.err
    assert [row["note"] for row in check.rows if row["check"] == "loss"] == [
        "training_step() of the example alone"
    ] * 2


def test_a_lightning_folder_asks_for_the_class(lightning_run, influence):
    result = influence("init", lightning_run / "lightning_logs/version_0/checkpoints")
    refused(
        result,
        2,
        "holds Lightning checkpoints, which do not name their class",
        "--model package.module:Class",
    )


NETS = """
import torch
from torch import nn
from torch.nn import functional as F

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

class Mean(Base):
    def training_step(self, batch, number):
        return {"loss": nn.CrossEntropyLoss()(self.net(batch[0]), batch[1]) + 0.1 * self.net.weight.square().sum()}

class Weighted(Base):  # its mean divides by the weights of the batch
    def training_step(self, batch, number):
        return F.cross_entropy(self.net(batch[0]), batch[1], weight=torch.tensor([1.0, 2.0, 3.0]))

class Squares(Base):
    def training_step(self, batch, number):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).float())

class Summed(Base):
    def training_step(self, batch, number):
        return F.mse_loss(self.net(batch[0]), F.one_hot(batch[1], 3).float(), reduction="sum")

class Contrast(Base):
    def training_step(self, batch, number):
        scores = self.net(batch[0])
        return (scores - scores.mean(0)).square().mean() + scores.sum()

class Manual(Base):
    def training_step(self, batch, number):
        return None
"""


@pytest.fixture
def nets(tmp_path):
    (tmp_path / "nets.py").write_text(NETS)

    def make(name, **options):
        return LightningTask(f"nets:{name}", tmp_path, **options)

    return make


def pairs():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, generator=generator), torch.tensor(i % 3)) for i in range(5)]


@pytest.mark.parametrize(
    "name, one_by_one",
    [
        ("Mean", False),
        ("Weighted", True),
        ("Squares", False),
        ("Summed", False),
        ("Contrast", True),
    ],
)
def test_losses_of_a_batch_are_those_of_training_step_alone(name, one_by_one, nets):
    assert needs_one_by_one(nets(name), pairs()) is one_by_one
    task = nets(name, one_by_one=one_by_one)
    model = task.model()
    batch = torch.utils.data.default_collate(pairs())
    losses = task.loss(model, batch)
    for i, loss in enumerate(losses):
        alone = model.training_step([part[i : i + 1] for part in batch], 0)
        alone = alone["loss"] if isinstance(alone, dict) else alone
        assert torch.allclose(loss, alone, rtol=1e-5)


def test_what_has_no_loss_or_no_class_is_named(nets, tmp_path):
    with pytest.raises(DefinitionError, match=r"training_step\(\) returned a NoneType"):
        nets("Manual").loss(nets("Manual").model(), pairs()[0])
    with pytest.raises(DefinitionError, match="nets has no class Other"):
        nets("Other").model()
    with pytest.raises(DefinitionError, match="nowhere can't be imported"):
        LightningTask("nowhere:Net", tmp_path).model()
    (tmp_path / "plain.py").write_text(
        "from torch import nn\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 2)\n"
    )
    with pytest.raises(DefinitionError, match=r"plain:Net has no training_step\(\)"):
        LightningTask("plain:Net", tmp_path).model()


def test_rows_are_pairs_of_input_and_label(tmp_path, nets):
    from PIL import Image

    Image.fromarray(np.full((2, 3, 3), 51, dtype=np.uint8)).save(tmp_path / "a.png")
    task = nets("Mean", inputs=["image"], label="label", scale=255)
    pixels, label = task.example({"image": str(tmp_path / "a.png"), "label": 2})
    assert pixels.shape == (3, 2, 3) and torch.allclose(pixels, torch.tensor(0.2))
    assert label.dtype == torch.int64 and task.label_text((pixels, label)) == "2"
    numbers, label = nets("Mean", inputs=["a", "b"], label="y").example(
        {"a": "1.5", "b": 2, "y": "0.5"}
    )
    assert numbers.tolist() == [1.5, 2] and label.dtype == torch.float32


def test_the_modules_own_dataloaders_give_the_examples(tmp_path):
    (tmp_path / "nets.py").write_text(
        NETS + "class Own(Mean):\n"
        "    def train_dataloader(self):\n"
        "        return torch.utils.data.DataLoader([(torch.ones(4), 1)] * 3)\n"
        "    def val_dataloader(self):\n"
        "        return [1]\n"
    )
    task = LightningTask("nets:Own", tmp_path)
    assert len(task.dataset("train")) == 3
    with pytest.raises(DefinitionError, match=r"val_dataloader\(\) of nets:Own returned a list"):
        task.dataset("val")
