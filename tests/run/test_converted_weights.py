"""Folders whose tensors transformers stores in another layout than the model has in memory."""

import json

import pytest
import torch

from tests.integrations import hf_runs
from tests.refusals import refused

DEFINITION = """
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModelForCausalLM

X = torch.arange(30).view(5, 6) % 24

def model():
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(Path(__file__).parent / "checkpoint-10"))

def train_data(): return torch.utils.data.TensorDataset(X)
query_data = train_data

def loss(model, batch):
    logits = model(input_ids=batch[0]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch[0][:, 1:], reduction="none").mean(1)
"""


@pytest.fixture
def mixtral(tmp_path):
    """A folder with one file of tensors per expert; the model in memory has them joined."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=24,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=16,
        num_local_experts=4,
        initializer_range=0.3,
    )
    for step in (10, 20):
        torch.manual_seed(step)
        place = tmp_path / f"checkpoint-{step}"
        MixtralForCausalLM(config).save_pretrained(place)
        state = {"global_step": step, "log_history": [{"step": step, "learning_rate": 0.1}]}
        (place / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "definition.py").write_text(DEFINITION)
    return tmp_path


def test_a_mixture_of_experts_loads_as_from_pretrained_loads_it(mixtral, influence):
    from transformers import MixtralForCausalLM

    result = influence("score", mixtral, "--top", "all")
    assert result.code == 0, result.err
    computed, expected = torch.zeros(5, 5), torch.zeros(5, 5)
    for row in result.rows:
        computed[int(row["query"]), int(row["train"])] = float(row["score"])
    texts = torch.arange(30).view(5, 6) % 24
    for step in (10, 20):
        model = MixtralForCausalLM.from_pretrained(mixtral / f"checkpoint-{step}").eval()
        parameters = list(model.parameters())
        rows = [
            torch.autograd.grad(
                model(input_ids=x[None], labels=x[None]).loss, parameters, allow_unused=True
            )
            for x in texts
        ]
        grads_ND = torch.stack(
            [
                torch.cat(
                    [
                        torch.zeros_like(p).flatten() if g is None else g.flatten()
                        for p, g in zip(parameters, row, strict=True)
                    ]
                )
                for row in rows
            ]
        )
        expected += 0.1 * grads_ND @ grads_ND.T
    assert (computed - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_folder_that_lacks_weights_is_refused_though_transformers_would_make_some_up(
    mixtral, influence
):
    from safetensors.torch import load_file, save_file

    path = mixtral / "checkpoint-20/model.safetensors"
    values = load_file(path)
    del values["lm_head.weight"]
    save_file(values, path, {"format": "pt"})
    refused(
        influence("score", mixtral),
        1,
        "checkpoint-20 does not fit the model",
        "missing:    lm_head.weight",
    )


def test_a_body_without_the_head_of_the_model_is_refused(tmp_path, influence):
    """transformers would give the head random weights, with a warning."""
    from transformers import BertModel

    place = tmp_path / "checkpoint-10"
    BertModel(hf_runs.bert_config()).save_pretrained(place)
    (tmp_path / "definition.py").write_text(
        "import torch\nfrom pathlib import Path\nfrom transformers import BertConfig, BertForSequenceClassification\n"
        "def model(): return BertForSequenceClassification(BertConfig.from_pretrained(Path(__file__).parent / 'checkpoint-10'))\n"
        "def train_data(): return [torch.tensor([1, 2])]\nquery_data = train_data\n"
        "def loss(model, batch): return model(input_ids=batch).logits[:, 0]\n"
    )
    refused(
        influence("score", tmp_path, "--lr", "0.1"),
        1,
        "checkpoint-10 does not fit the model",
        "missing:    classifier.weight",
    )
