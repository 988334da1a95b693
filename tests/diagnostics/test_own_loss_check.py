"""`influence check` compares the definition's loss with the model's own, and names the cause of a difference."""

import json

import pytest
import torch

from tests.integrations import hf_runs

DEFINITION = """
from pathlib import Path
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSequenceClassification

HERE = Path(__file__).parent

def model():
    return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(HERE / "checkpoint-10"))

def examples(seed):
    g = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(5, 20, (6,), generator=g), "token_type_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
         "attention_mask": torch.ones(6, dtype=torch.int64), "label": i % 2}
        for i in range(6)
    ]

def train_data(): return examples(0)
def query_data(): return examples(1)

NAMES = ("input_ids", "attention_mask", "token_type_ids")

def collate(items):
    batch = {name: torch.stack([item[name] for item in items]) for name in NAMES}
    return batch | {"labels": torch.tensor([item["label"] for item in items])}

def loss(model, batch):
    logits = model(**{name: batch[name] for name in NAMES}).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")
"""


@pytest.fixture
def bert_run(tmp_path):
    from transformers import BertForSequenceClassification

    def make(definition=DEFINITION):
        torch.manual_seed(0)
        place = tmp_path / "checkpoint-10"
        BertForSequenceClassification(hf_runs.bert_config(num_labels=2)).save_pretrained(place)
        state = {"global_step": 10, "log_history": [{"step": 10, "learning_rate": 0.1}]}
        (place / "trainer_state.json").write_text(json.dumps(state))
        (tmp_path / "definition.py").write_text(definition)
        return tmp_path

    return make


def own(result):
    return [row for row in result.rows if row["check"] == "loss"]


def test_the_models_own_loss_passes(bert_run, influence):
    result = influence("check", bert_run())
    assert result.code == 0, result.err
    assert [(row["split"], row["note"]) for row in own(result)] == [
        ("train", "the model's own .loss"),
        ("query", "the model's own .loss"),
    ]


def test_a_dropped_column_fails_and_is_named(bert_run, influence):
    """A definition that leaves out token_type_ids gives wrong scores for pairs of texts."""
    result = influence(
        "check",
        bert_run(DEFINITION.replace('"attention_mask", "token_type_ids")', '"attention_mask")')),
    )
    assert result.code == 1
    assert {row["result"] for row in own(result)} == {"FAILED"}
    assert all(
        "collate() drops token_type_ids, which the model's forward takes" in row["note"]
        for row in own(result)
    )
    assert "the scores are of another loss than the model's: correct definition.py" in result.err


def test_another_loss_fails(bert_run, influence):
    result = influence(
        "check",
        bert_run(DEFINITION.replace('reduction="none")', 'reduction="none", label_smoothing=0.1)')),
    )
    assert result.code == 1
    assert all(
        "the definition computes another loss than the model" in row["note"] for row in own(result)
    )


def test_a_model_without_a_loss_of_its_own_has_no_row(make_run, influence):
    result = influence("check", make_run())
    assert result.code == 0 and not own(result)


def test_a_training_step_that_needs_its_trainer_has_no_row(make_run, influence):
    from tests.conftest import DEFINITION as PLAIN

    definition = PLAIN.replace(
        "def model():\n    return nn.Sequential",
        "class Net(nn.Sequential):\n    def training_step(self, batch, number):\n        return self.trainer.loss\n\ndef model():\n    return Net",
    )
    result = influence("check", make_run("run", definition))
    assert result.code == 0 and not own(result)
    assert "check did not compare the loss with the model's own: that raised" in result.err
