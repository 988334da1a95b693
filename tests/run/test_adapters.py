"""Adapters (peft): read over the weights of model(), mixed with whole models, in every kind that can be read; the
weights below them belong to the cache's identity."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from tests.refusals import refused

DEFINITION = """
from pathlib import Path
import peft, torch
from torch import nn

torch.manual_seed(0)
X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)
    def forward(self, x):
        return self.head(torch.tanh(self.first(x)))

def base():
    torch.manual_seed({seed})
    return Net()

def config():
    return {config}

def model():
    return peft.get_peft_model(base(), config())

def train_data(): return torch.utils.data.TensorDataset(X, Y)
def query_data(): return torch.utils.data.TensorDataset(X[:3], Y[:3])
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""
LORA = 'peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first"], modules_to_save=["head"])'
KINDS = {
    "LoRA with a trained head": LORA,
    "rank-stabilised LoRA": 'peft.LoraConfig(r=2, lora_alpha=4, use_rslora=True, target_modules=["first", "head"])',
    "DoRA": 'peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["first"], modules_to_save=["head"])',
    "LoRA with trained biases": 'peft.LoraConfig(r=2, lora_alpha=4, bias="lora_only", target_modules=["first"])',
    "IA3": 'peft.IA3Config(target_modules=["first"], feedforward_modules=[], modules_to_save=["head"])',
    "LoHa": 'peft.LoHaConfig(r=2, alpha=4, target_modules=["first"])',
    "OFT": 'peft.OFTConfig(r=0, oft_block_size=2, target_modules=["first"])',
}


def load_definition(text):
    space: dict = {"__name__": "a_definition"}
    exec(text, space)
    return space


def write_adapters(run, config=LORA, seed=5, steps=(10, 20)):
    """A folder as Trainer and peft leave it: checkpoint-N with the adapter alone."""
    run.mkdir(exist_ok=True)
    text = DEFINITION.replace("{config}", config).replace("{seed}", str(seed))
    (run / "definition.py").write_text(text)
    space = load_definition(text)
    for step in steps:
        model = space["model"]()
        torch.manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
        place = run / f"checkpoint-{step}"
        model.save_pretrained(place)
        write_state(place, step)
    return space


def write_state(place, step):
    place.mkdir(exist_ok=True)
    state = {"global_step": step, "log_history": [{"step": step, "learning_rate": 0.1}]}
    (place / "trainer_state.json").write_text(json.dumps(state))


def expected_scores(space, run, steps=(10, 20)):
    """(3, 8) by autograd, one example at a time, of what peft itself loads."""
    import peft

    total = torch.zeros(3, 8)
    for step in steps:
        model = peft.PeftModel.from_pretrained(
            space["base"](), run / f"checkpoint-{step}", is_trainable=True
        ).eval()
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows = []
        for x, y in zip(space["X"], space["Y"], strict=True):
            loss = nn.functional.cross_entropy(model(x[None]), y[None])
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            rows.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
        grads_ND = torch.stack(rows)
        total += 0.1 * grads_ND[:3] @ grads_ND.T
    return total


def table(result):
    assert result.code == 0, result.err
    scores = torch.zeros(3, 8)
    for row in result.rows:
        scores[int(row["query"]), int(row["train"])] = float(row["score"])
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_scored_as_peft_loads_them(kind, tmp_path, influence):
    space = write_adapters(tmp_path / "run", KINDS[kind])
    scores = table(influence("score", tmp_path / "run", "--top", "all"))
    expected = expected_scores(space, tmp_path / "run")
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert influence("check", tmp_path / "run").code == 0


PROMPTS = """
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

def model():
    config = BertConfig.from_pretrained(Path(__file__).parent / "base")
    return get_peft_model(BertForSequenceClassification(config), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))

def train_data(): return [torch.tensor([1, 2])]
query_data = train_data
def loss(model, batch): return model(input_ids=batch).logits[:, 0]
"""


def test_an_adapter_of_prompts_is_refused_by_its_kind(tmp_path, influence):
    from peft import PromptTuningConfig, get_peft_model

    from tests.integrations.hf_runs import bert_config

    run = tmp_path / "run"
    run.mkdir()
    from transformers import BertForSequenceClassification

    base = BertForSequenceClassification(bert_config())
    base.save_pretrained(run / "base")
    get_peft_model(
        base, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    ).save_pretrained(run / "checkpoint-10")
    write_state(run / "checkpoint-10", 10)
    (run / "definition.py").write_text(PROMPTS)
    refused(
        influence("score", run),
        1,
        "adapters of the kind PROMPT_TUNING can't be read",
        "LoRA, DoRA, IA3",
    )


PLAIN = """
import torch
from torch import nn
torch.manual_seed(0)
X, Y = torch.randn(8, 4), torch.randint(0, 3, (8,))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.down, self.up, self.head = nn.Linear(4, 6).requires_grad_(False), nn.Linear(4, 2), nn.Linear(2, 6), nn.Linear(6, 3)
    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))

def model():
    torch.manual_seed(5)
    return Net()

def train_data(): return torch.utils.data.TensorDataset(X, Y)
def query_data(): return torch.utils.data.TensorDataset(X[:3], Y[:3])
def loss(model, batch): return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def plain_run(run, other_base=False):
    """A layer written by hand: step 10 is a whole model, steps 20 and 30 are adapters."""
    run.mkdir()
    (run / "definition.py").write_text(PLAIN)
    space = load_definition(PLAIN)
    for step in (10, 20, 30):
        model = space["model"]()
        torch.manual_seed(step)
        for parameter in model.parameters():
            if parameter.requires_grad or (other_base and step == 10):
                parameter.data = torch.randn_like(parameter)
        place = run / f"checkpoint-{step}"
        write_state(place, step)
        if step == 10:
            save_model(model, str(place / "model.safetensors"))
        else:
            save_file(
                {
                    f"base_model.model.{name}": value.data
                    for name, value in model.named_parameters()
                    if value.requires_grad
                },
                str(place / "adapter_model.safetensors"),
            )
    return space


@pytest.mark.parametrize("other_base", [False, True])
def test_whole_models_and_adapters_are_each_read_as_what_they_are(other_base, tmp_path, influence):
    """A whole model may hold other weights below the adapter; the adapters' are those of model()."""
    run = tmp_path / "run"
    space = plain_run(run, other_base)
    expected = torch.zeros(3, 8)
    for step in (10, 20, 30):
        model = space["model"]()
        if step == 10:
            model.load_state_dict(load_file(run / "checkpoint-10/model.safetensors"))
        else:
            values = load_file(run / f"checkpoint-{step}/adapter_model.safetensors")
            model.load_state_dict(
                {name.removeprefix("base_model.model."): value for name, value in values.items()},
                strict=False,
            )
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows = [
            torch.cat(
                [
                    grad.flatten()
                    for grad in torch.autograd.grad(
                        nn.functional.cross_entropy(model(x[None]), y[None]), parameters
                    )
                ]
            )
            for x, y in zip(space["X"], space["Y"], strict=True)
        ]
        grads_ND = torch.stack(rows)
        expected += 0.1 * grads_ND[:3] @ grads_ND.T
    scores = table(influence("score", run, "--top", "all"))
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()
    again = table(influence("score", run, "--top", "all", "--cache", "none"))
    assert torch.equal(scores, again)


def test_other_weights_below_an_adapter_are_another_run(tmp_path, influence):
    """A cache of one base model must not answer for another one."""
    run = tmp_path / "run"
    space = write_adapters(run, seed=5)
    first = table(influence("score", run, "--top", "all"))
    text = DEFINITION.replace("{config}", LORA).replace("{seed}", "6")
    (run / "definition.py").write_text(text)
    second = table(influence("score", run, "--top", "all"))
    assert not torch.allclose(first, second)
    space = load_definition(text)
    assert torch.allclose(second, expected_scores(space, run), rtol=1e-4, atol=1e-6)


def test_another_scale_of_the_adapter_is_refused(tmp_path, influence):
    """lora_alpha is in the config alone: with another one every score would be wrong."""
    run = tmp_path / "run"
    write_adapters(run)
    path = run / "checkpoint-20/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 16}))
    refused(
        influence("score", run),
        1,
        "checkpoint-20 does not fit the model",
        "lora_alpha is 16 in the file, 4 in the model",
    )


def test_an_adapter_without_a_trained_tensor_is_refused(tmp_path, influence):
    run = tmp_path / "run"
    write_adapters(run)
    path = run / "checkpoint-10/adapter_model.safetensors"
    values = load_file(path)
    lost = next(name for name in values if "lora_A" in name)
    del values[lost]
    save_file(values | {"stray": torch.zeros(2)}, path)
    refused(
        influence("score", run),
        1,
        "checkpoint-10 does not fit the model",
        "missing:    base_model.model.first.lora_A.default.weight",
        "unexpected: stray",
    )


def test_a_whole_model_beside_an_adapter_in_one_folder_is_refused(tmp_path, influence):
    run = tmp_path / "run"
    space = write_adapters(run)
    save_model(space["base"](), str(run / "checkpoint-10/model.safetensors"))
    refused(influence("score", run), 1, "checkpoint-10 holds both a whole model and an adapter")


def test_a_quantised_base_is_left_as_it_is(tmp_path, influence):
    """The base's numbers are uint8 buffers, as in 8-bit and 4-bit layers; the adapter is trained."""
    text = PLAIN.replace("nn.Linear(4, 6).requires_grad_(False)", "Quantised()").replace(
        "class Net",
        "class Quantised(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('weight', torch.randint(0, 255, (6, 4), dtype=torch.uint8))\n"
        "        self.register_buffer('scale', torch.rand(6, 1))\n"
        "    def forward(self, x):\n"
        "        return nn.functional.linear(x, (self.weight.to(x.dtype) - 128) * self.scale.to(x.dtype) / 128)\n\n"
        "class Net",
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "definition.py").write_text(text)
    space = load_definition(text)
    for step in (10, 20):
        model = space["model"]()
        write_state(run / f"checkpoint-{step}", step)
        values = {
            f"base_model.model.{name}": value.data + 0.1 * step
            for name, value in model.named_parameters()
        }
        save_file(values, str(run / f"checkpoint-{step}/adapter_model.safetensors"))
    exact = table(influence("score", run, "--top", "all"))
    double = table(influence("score", run, "--top", "all", "--precision", "float64"))
    assert (exact - double).abs().max() <= 1e-5 * double.abs().max()
    assert influence("check", run).code == 0


def test_a_frozen_adapter_says_how_to_train_it(tmp_path, influence):
    run = tmp_path / "run"
    write_adapters(run)
    text = (run / "definition.py").read_text()
    (run / "definition.py").write_text(
        text.replace(
            "peft.get_peft_model(base(), config())",
            "peft.PeftModel.from_pretrained(base(), Path(__file__).parent / 'checkpoint-10')",
        )
    )
    refused(influence("score", run), 1, "the model has no trained parameter", "is_trainable=True")


def test_check_names_a_base_model_with_random_weights(tmp_path, influence):
    """A definition that builds the base from its config, and does not load it."""
    run = tmp_path / "run"
    write_adapters(run)
    assert influence("check", run).code == 0
    text = (run / "definition.py").read_text()
    (run / "definition.py").write_text(text.replace("    torch.manual_seed(5)\n", ""))
    result = influence("check", run, "--cache", "none")
    assert result.code == 1
    assert "base of train examples: weights below adapters" in result.err
    assert "model() builds other weights each time" in result.err
