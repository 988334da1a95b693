"""--base DIR: adapters merged into the base model, against peft's own model with the adapter on."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.refusals import refused


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A base model, two adapter checkpoints (one .bin), and the logits of the second one."""
    peft = pytest.importorskip("peft")
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("adapters")
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    base.save_pretrained(folder / "base")
    content = json.loads((folder / "base" / "config.json").read_text())
    for key in ("id2label", "label2id"):  # as that of a base model without labels
        content.pop(key, None)
    (folder / "base" / "config.json").write_text(json.dumps(content))
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    model = peft.get_peft_model(base, lora).eval()
    for step in (5, 10):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
        model.save_pretrained(folder / "out" / f"checkpoint-{step}")
    path = folder / "out" / "checkpoint-5" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    ids = torch.arange(6).view(2, 3)
    return folder, ids, model(input_ids=ids).logits.detach()


def test_merged_weights_give_the_logits_of_peft(adapters, tmp_path, influence):
    from transformers import AutoConfig, BertForSequenceClassification

    folder, ids, logits = adapters
    result = influence("convert", folder / "out", tmp_path / "to", "--base", folder / "base")
    paths = [tmp_path / "to" / f"step-0000{step}.safetensors" for step in ("05", "10")]
    assert (result.code, result.out.split()) == (0, list(map(str, paths))), result.err
    config = AutoConfig.from_pretrained(folder / "base", num_labels=3)
    model = BertForSequenceClassification(config).eval()
    model.load_state_dict(load_file(paths[1]))
    assert torch.allclose(model(input_ids=ids).logits, logits, atol=1e-5)
    assert not torch.equal(load_file(paths[0])["classifier.weight"], model.classifier.weight)


def test_a_base_without_config_is_refused(adapters, tmp_path, influence):
    folder, *_ = adapters
    result = influence("convert", folder / "out", tmp_path / "to", "--base", tmp_path)
    refused(result, 2, "holds no Hugging Face model", "no config.json")


def test_a_base_of_another_size_is_refused(adapters, tmp_path, influence):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8, num_labels=3,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(tmp_path / "base")
    folder, *_ = adapters
    result = influence("convert", folder / "out", tmp_path / "to", "--base", tmp_path / "base")
    refused(result, 1, "peft can't merge", "name the folder of the base model")
