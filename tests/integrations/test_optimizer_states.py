"""optimizer.pt to states by parameter name: against real optimizers of a Trainer and of torch."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from influence_cli import TrajectoryRecorder
from tests.refusals import refused

# ---------------------------------------------------------------- a real Trainer
BERT = """
import torch
from transformers import BertConfig, BertForSequenceClassification


def model():
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config)

def train_data():
    return [{"input_ids": torch.tensor([1, 2, i]), "labels": torch.tensor(i % 2)} for i in range(8)]

def query_data():
    return train_data()

def loss(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits
    return torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
"""


@pytest.fixture(scope="module")
def trainer_run(tmp_path_factory):
    """A Trainer's folder after 2 steps, with definition.py; and the optimizer's state by name."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("trainer")
    (folder / "definition.py").write_text(BERT)
    space: dict = {"__name__": "definition_of_a_test"}
    exec(BERT, space)
    torch.manual_seed(0)
    model = space["model"]()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "out"), max_steps=2, save_steps=1, weight_decay=0.01,
        per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
        learning_rate=0.01,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=space["train_data"]())
    trainer.train()
    optimizer = trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    states = {
        f"{state}/{name}": value.detach().clone()
        for name, parameter in model.named_parameters()
        for state, value in optimizer.state[parameter].items()
    }
    return folder, states


def test_a_trainers_state_gets_the_names_of_the_real_optimizer(trainer_run, tmp_path, influence):
    folder, states = trainer_run
    result = influence("convert", folder / "out", tmp_path / "to", "--run", folder)
    paths = [tmp_path / "to" / f"step-00000{step}.safetensors" for step in (1, 2)]
    assert (result.code, result.out.split()) == (0, list(map(str, paths))), result.err
    saved = load_file(paths[1])
    assert saved.keys() == states.keys()
    assert all(torch.equal(saved[key], states[key]) for key in states)
    with safe_open(paths[1], "pt") as file:
        assert file.metadata()["optimizer"] == "adamw"
        assert file.metadata()["numbers"] == "[]"


def test_the_mapping_is_printed_and_what_is_not_verified_is_named(trainer_run, tmp_path, influence):
    folder, _ = trainer_run
    place = folder / "out" / "checkpoint-2"
    result = influence("convert", place, tmp_path / "to", "--run", folder)
    assert "(Trainer of transformers 5: decay, no decay)" in result.err
    assert "  classifier.weight  group 0  (2, 16)\n" in result.err
    assert "  classifier.bias  group 1  (2,)\n" in result.err
    assert "no recorded step verified the values" in result.err


def test_a_model_of_another_size_is_refused(trainer_run, tmp_path, influence):
    folder, _ = trainer_run
    run = tmp_path / "run"
    run.mkdir()
    (run / "definition.py").write_text(BERT.replace("hidden_size=16", "hidden_size=8"))
    result = influence("convert", folder / "out", tmp_path / "to", "--run", run)
    refused(
        result, 1, "optimizer.pt does not fit the parameters of the model in definition.py",
        "has the shape (20, 16), not (20, 8)",
    )  # fmt: skip
    (run / "definition.py").write_text(BERT.replace("layers=1", "layers=2"))
    result = influence("convert", folder / "out", tmp_path / "to", "--run", run)
    refused(result, 1, "does not fit", "it gives groups of")


def test_scheduler_pt_of_a_trainer_is_the_next_steps_rate(trainer_run):
    """A Trainer's linear schedule from 0.01 over 2 steps: 0.005 after the first, then 0."""
    from influence_cli.run.scheduler_files import read_scheduler_rate

    folder, _ = trainer_run
    rates = [
        read_scheduler_rate(folder / "out" / f"checkpoint-{step}" / "scheduler.pt")
        for step in (1, 2)
    ]
    assert rates == [pytest.approx(0.005), 0.0]


# ---------------------------------------------------------------- torch's optimizers
NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def model():
    return Net()

def train_data():
    torch.manual_seed(7)
    return torch.utils.data.TensorDataset(torch.randn(12, 3), torch.randint(0, 2, (12,)))

query_data = train_data

def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def make_net_run(folder):
    folder.mkdir()
    (folder / "definition.py").write_text(NET)
    space: dict = {"__name__": "definition_of_a_test"}
    exec(NET, space)
    torch.manual_seed(0)
    return space, space["model"]()


def take_step(space, model, optimizer, ids=(0, 1, 2)):
    data = space["train_data"]()
    batch = data[list(ids)]
    optimizer.zero_grad()
    space["loss"](model, batch).mean().backward()
    optimizer.step()


def save(path, optimizer):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(optimizer.state_dict(), path)
    return path


def states_by_name(model, optimizer):
    return {
        f"{state}/{name}": value
        for name, parameter in model.named_parameters()
        for state, value in optimizer.state[parameter].items()
        if value is not None
    }


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "adam": lambda model: torch.optim.Adam(model.parameters(), amsgrad=True),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_group_has_the_order_of_the_models_parameters(name, tmp_path, influence):
    space, model = make_net_run(tmp_path / "run")
    optimizer = OPTIMIZERS[name](model)
    take_step(space, model, optimizer)
    path = save(tmp_path / "checkpoint-1" / "optimizer.pt", optimizer)
    result = influence("convert", path, tmp_path / "to", "--run", tmp_path / "run")
    assert result.code == 0, result.err
    saved = load_file(tmp_path / "to" / "step-000001.safetensors")
    expected = states_by_name(model, optimizer)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
    with safe_open(tmp_path / "to" / "step-000001.safetensors", "pt") as file:
        assert file.metadata()["optimizer"] == name


def test_the_state_in_a_wrapped_checkpoint_is_read(tmp_path, influence):
    space, model = make_net_run(tmp_path / "run")
    optimizer = torch.optim.AdamW(model.parameters())
    take_step(space, model, optimizer)
    content = {"state_dict": model.state_dict(), "global_step": 6,
               "optimizer_states": [optimizer.state_dict()]}  # fmt: skip
    torch.save(content, tmp_path / "last.ckpt")
    result = influence(
        "convert", tmp_path / "last.ckpt", tmp_path / "to", "--run", tmp_path / "run"
    )
    assert result.out == f"{tmp_path / 'to' / 'step-000006.safetensors'}\n"


def test_groups_with_names_in_the_file_need_no_rule(tmp_path, influence):
    """torch stores the names where an optimizer gets model.named_parameters()."""
    space, model = make_net_run(tmp_path / "run")
    named = dict(model.named_parameters())
    order = sorted(named, reverse=True)
    optimizer = torch.optim.AdamW([(name, named[name]) for name in order])
    take_step(space, model, optimizer)
    path = save(tmp_path / "checkpoint-1" / "optimizer.pt", optimizer)
    result = influence("convert", path, tmp_path / "to", "--run", tmp_path / "run")
    assert "(names in the file)" in result.err
    saved = load_file(tmp_path / "to" / "step-000001.safetensors")
    expected = states_by_name(model, optimizer)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)


def test_two_orders_that_fit_are_refused(tmp_path, influence):
    """Two groups without a state yet: of the first half, or of what decays? Shapes do not tell."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "definition.py").write_text(NET.replace("nn.Linear(3, 3)", "Square()").replace(
        "class Net", "class Square(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        self.bias = nn.Parameter(torch.zeros(3, 3))\n"
        "        self.weight = nn.Parameter(torch.zeros(3, 3))\n    def forward(self, x):\n"
        "        return x @ self.weight + self.bias.sum(0)\n\nclass Net",
    ).replace("nn.Linear(3, 2)", "Square()"))  # fmt: skip
    space: dict = {"__name__": "definition_of_a_test"}
    exec((run / "definition.py").read_text(), space)
    parameters = list(space["model"]().parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:3]}, {"params": parameters[3:]}])
    path = save(tmp_path / "checkpoint-1" / "optimizer.pt", optimizer)
    result = influence("convert", path, tmp_path / "to", "--run", run)
    refused(result, 1, "two orders of the parameters fit, and they differ", "Trainer")


FOREIGN = {
    "8-bit": ({"state1": torch.ones(3, 3), "step": 1}, "influence does not replay", "state1"),
    "factored": ({"exp_avg_sq_row": torch.ones(3)}, "does not fit", "exp_avg_sq_row of one.weight"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_states_of_other_optimizers_are_refused(case, tmp_path, influence):
    state, *texts = FOREIGN[case]
    make_net_run(tmp_path / "run")
    content = {"state": {0: state}, "param_groups": [{"lr": 0.1, "params": list(range(6))}]}
    torch.save(content, tmp_path / "optimizer-1.pt")
    result = influence("convert", tmp_path / "optimizer-1.pt", tmp_path / "to", "--run",
                       tmp_path / "run")  # fmt: skip
    refused(result, 1, *texts)


BROKEN = {
    "no optimizer": ({"a": 1}, "holds no optimizer states"),
    "two": (
        {"optimizer_states": [{"param_groups": [], "state": {}}] * 2}, "holds 2 optimizer states"
    ),
    "no numbers": (
        {"param_groups": [{"params": ["a"]}], "state": {}}, "is no state dict of a torch optimizer"
    ),
    "twice": (
        {"param_groups": [{"params": [0, 0]}], "state": {}}, "belong to no parameter of its groups"
    ),
    "no state": (
        {"param_groups": [{"params": list(range(6)), "nesterov": False}], "state": {}},
        "state-1.pt holds no state",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_states_are_refused(case, tmp_path, influence):
    content, text = BROKEN[case]
    make_net_run(tmp_path / "run")
    torch.save(content, tmp_path / "state-1.pt")
    result = influence("convert", tmp_path / "state-1.pt", tmp_path / "to", "--run",
                       tmp_path / "run")  # fmt: skip
    refused(result, 1, text)


def test_a_folder_without_states_is_refused(tmp_path, influence):
    make_net_run(tmp_path / "run")
    result = influence("convert", tmp_path, tmp_path / "to", "--run", tmp_path / "run")
    refused(result, 2, "holds no optimizer state", "checkpoint-N/optimizer.pt")


# ---------------------------------------------------------------- verification
@pytest.fixture
def recorded(tmp_path):
    """A recorded run of 3 steps of AdamW with a checkpoint each; and optimizer.pt after step 2."""
    space, model = make_net_run(tmp_path / "run")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    data = space["train_data"]()
    with TrajectoryRecorder(tmp_path / "run", model, optimizer, checkpoint_every=1) as recorder:
        for step in range(3):
            ids = [3 * step, 3 * step + 1, 3 * step + 2]
            optimizer.zero_grad()
            space["loss"](model, data[ids]).mean().backward()
            recorder.step(ids)
            optimizer.step()
            if step == 1:
                save(tmp_path / "checkpoint-2" / "optimizer.pt", optimizer)
    return tmp_path


def test_one_recorded_step_verifies_the_state(recorded, influence):
    run = recorded / "run"
    result = influence("convert", recorded / "checkpoint-2", run / "optimizer", "--run", run)
    assert result.code == 0, result.err
    assert "replaying steps 2 to 2 from the converted state gives checkpoint 3" in result.err


def test_a_state_of_other_values_is_not_verified(recorded, influence):
    """The states of two parameters of one shape, exchanged: only the replay sees it."""
    path, run = recorded / "checkpoint-2" / "optimizer.pt", recorded / "run"
    content = torch.load(path, weights_only=True)
    content["state"][0], content["state"][2] = content["state"][2], content["state"][0]
    torch.save(content, path)
    result = influence("convert", path, run / "optimizer", "--run", run)
    assert "does not give checkpoint 3" in result.err
    assert "The order of the parameters is not verified" in result.err


def test_a_converted_state_is_the_one_that_the_recorder_saves(tmp_path, influence):
    space, model = make_net_run(tmp_path / "run")
    optimizer, data = torch.optim.AdamW(model.parameters(), lr=0.05), space["train_data"]()
    saved = {"checkpoint_every": 1, "save_optimizer": True}
    with TrajectoryRecorder(tmp_path / "run", model, optimizer, **saved) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            space["loss"](model, data[[step, step + 1]]).mean().backward()
            recorder.step([step, step + 1])
            optimizer.step()
            save(tmp_path / f"checkpoint-{step + 1}" / "optimizer.pt", optimizer)
    influence("convert", tmp_path / "checkpoint-2", tmp_path / "to", "--run", tmp_path / "run")
    name = "step-000002.safetensors"
    recorded = (tmp_path / "run" / "optimizer" / name).read_bytes()
    assert (tmp_path / "to" / name).read_bytes() == recorded


def test_the_recorded_groups_give_the_names(tmp_path, influence):
    """Groups that no rule knows: the trajectory's header lists them."""
    space, model = make_net_run(tmp_path / "run")
    named = dict(model.named_parameters())
    order = ["head.bias", "one.weight", "two.bias", "head.weight", "two.weight", "one.bias"]
    groups = [{"params": [named[name] for name in order[:2]], "lr": 0.1},
              {"params": [named[name] for name in order[2:]], "lr": 0.2}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups)
    with TrajectoryRecorder(tmp_path / "run", model, optimizer, checkpoint_every=1) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            space["loss"](model, space["train_data"]()[[0, 1]]).mean().backward()
            recorder.step([0, 1])
            optimizer.step()
    path = save(tmp_path / "checkpoint-2" / "optimizer.pt", optimizer)
    result = influence("convert", path, tmp_path / "to", "--run", tmp_path / "run")
    assert "(groups of the trajectory)" in result.err, result.err
    saved = load_file(tmp_path / "to" / "step-000002.safetensors")
    expected = states_by_name(model, optimizer)
    assert all(torch.equal(saved[key], expected[key]) for key in expected)
