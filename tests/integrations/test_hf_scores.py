"""Runs of other libraries, from the folder to the table: `init`, then `score`, with no edit in between. The reference
is autograd of the model's own loss, one example at a time, of the model as transformers and peft load it."""

import base64
import io
import json
import os
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from influence_cli import open_run
from tests.integrations import hf_runs
from tests.report.pages import read_pictures

TOLERANCE = 1e-5  # relative to the largest score; both in float32


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name) -> the folder of that run; made once."""

    @cache
    def make(name: str) -> Path:
        return hf_runs.RUNS[name](tmp_path_factory.mktemp(name))

    return make


@pytest.fixture(autouse=True)
def separate_definitions(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def read_rows(folder: Path):
    import csv

    with (folder / "train.csv").open(newline="") as file:
        train = list(csv.DictReader(file))
    return train, [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def learning_rate(checkpoint: Path) -> float:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry][
        -1
    ]


def gradient(model, inputs: dict, factor: float) -> torch.Tensor:
    """(D,) of the model's own loss times a factor, over the trained parameters."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(model(**inputs).loss * factor, parameters, allow_unused=True)
    return torch.cat([grad.flatten() for grad in grads if grad is not None]).double()


def reference_scores(folder: Path, load, inputs_of) -> torch.Tensor:
    """(Q, N) TracIn of batch-size-one gradients. `load(checkpoint)`: the model; `inputs_of(row, checkpoint)`: the
    arguments of its forward with labels, and the factor of its loss."""
    train, queries = read_rows(folder)
    total = torch.zeros(len(queries), len(train), dtype=torch.float64)
    checkpoints = sorted((folder / "out").glob("checkpoint-*"))
    for checkpoint in checkpoints:
        model = load(checkpoint).eval()
        train_ND = torch.stack([gradient(model, *inputs_of(row, checkpoint)) for row in train])
        query_QD = torch.stack([gradient(model, *inputs_of(row, checkpoint)) for row in queries])
        total += learning_rate(checkpoint) * query_QD @ train_ND.T
    return total


def scores(influence, folder: Path, *flags: str, data=("train.csv", "test.jsonl")) -> torch.Tensor:
    """(Q, N) by the command line: init, then score."""
    out = folder / "out"
    if not (out / "definition.py").exists():
        result = influence(
            "init", out, "--data", folder / data[0], "--query-data", folder / data[1]
        )
        assert result.code == 0, result.err
    result = influence("score", out, "--top", "all", *flags)
    assert result.code == 0, result.err
    rows = [(int(row["query"]), int(row["train"]), float(row["score"])) for row in result.rows]
    table = torch.zeros(
        1 + max(row[0] for row in rows), 1 + max(row[1] for row in rows), dtype=torch.float64
    )
    for query, train, score in rows:
        table[query, train] = score
    return table


def agree(computed: torch.Tensor, expected: torch.Tensor) -> None:
    assert computed.shape == expected.shape
    assert (computed - expected).abs().max() <= TOLERANCE * expected.abs().max()


def batch_of_one(tokenizer, *texts, **labels) -> dict:
    return {
        **tokenizer(*texts, return_tensors="pt"),
        **{name: torch.tensor([value]) for name, value in labels.items()},
    }


def tokenizer_of(checkpoint: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


def test_bert_on_sentence_pairs_passes_token_types(runs, influence):
    from transformers import BertForSequenceClassification

    folder = runs("bert_pairs")

    def inputs_of(row, checkpoint):
        label = hf_runs.PAIR_LABELS.index(row["label"])
        return batch_of_one(
            tokenizer_of(checkpoint), row["premise"], row["hypothesis"], labels=label
        ), 1

    agree(
        scores(influence, folder),
        reference_scores(folder, BertForSequenceClassification.from_pretrained, inputs_of),
    )


def test_tied_and_sharded_gpt2_sums_the_loss_of_tokens(runs, influence):
    from transformers import GPT2LMHeadModel

    folder = runs("gpt2_sharded")
    assert len(list((folder / "out/checkpoint-10").glob("model-*.safetensors"))) > 1

    def inputs_of(row, checkpoint):
        inputs = dict(tokenizer_of(checkpoint)(row["text"], return_tensors="pt"))
        return {**inputs, "labels": inputs["input_ids"]}, inputs["input_ids"].numel() - 1

    agree(
        scores(influence, folder),
        reference_scores(folder, GPT2LMHeadModel.from_pretrained, inputs_of),
    )


def test_llama_saved_in_bfloat16_is_scored_in_float32(runs, influence):
    from transformers import LlamaForCausalLM

    folder = runs("llama_bf16")

    def load(checkpoint):
        return LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def inputs_of(row, checkpoint):
        tokenizer = tokenizer_of(checkpoint)
        prompt, text = (
            tokenizer(part, return_tensors="pt")["input_ids"]
            for part in (row["prompt"], row["prompt"] + row["completion"])
        )
        labels = text.clone()
        labels[:, : prompt.shape[1]] = -100
        return {"input_ids": text, "labels": labels}, text.shape[1] - prompt.shape[1]

    agree(scores(influence, folder), reference_scores(folder, load, inputs_of))


def test_lora_with_a_trained_head_is_read_over_its_base(runs, influence):
    from peft import PeftModel
    from transformers import BertForSequenceClassification

    folder = runs("lora_bert")

    def load(checkpoint):
        base = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
        return PeftModel.from_pretrained(base, checkpoint, is_trainable=True)

    def inputs_of(row, checkpoint):
        return batch_of_one(tokenizer_of(checkpoint), row["text"], labels=int(row["label"])), 1

    agree(scores(influence, folder), reference_scores(folder, load, inputs_of))


def test_a_vision_transformer_reads_folders_of_pictures(runs, influence):
    from PIL import Image
    from transformers import ViTForImageClassification, ViTImageProcessor

    folder = runs("vit")
    for split, number in (("train", 6), ("test", 2)):
        rows = [
            {"image": f"{split}/{name}/{i}.png", "label": label}
            for label, name in enumerate(("circle", "square"))
            for i in range(number)
        ]
        (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if split == "train":
            hf_runs.write_csv(folder / "train.csv", rows)

    def inputs_of(row, checkpoint):
        processor = ViTImageProcessor.from_pretrained(checkpoint)
        pixels = processor(Image.open(folder / row["image"]), return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([int(row["label"])])}, 1

    computed = scores(influence, folder, data=("train", "test"))
    agree(computed, reference_scores(folder, ViTForImageClassification.from_pretrained, inputs_of))


def test_a_page_has_the_pictures_that_a_vision_transformer_sees(runs, influence, tmp_path):
    from PIL import Image

    folder = runs("vit")
    if not (folder / "out/definition.py").exists():
        data = ("--data", folder / "train", "--query-data", folder / "test")
        influence("init", folder / "out", *data)
    result = influence("score", folder / "out", "--queries", "0", "--report", tmp_path / "p.html")
    assert result.code == 0, result.err
    query = next(iter(read_pictures(tmp_path / "p.html").values()))
    file = Image.open(folder / "test/circle/0.png").convert("RGB").resize((8, 8), 2)
    picture = Image.open(io.BytesIO(base64.b64decode(query.partition(",")[2])))
    assert np.abs(np.asarray(picture, np.int64) - np.asarray(file, np.int64)).max() <= 1


@pytest.mark.parametrize("name", hf_runs.HUGGING_FACE)
def test_check_passes_and_compares_the_loss_with_the_models_own(name, runs, influence):
    folder = runs(name)
    if not (folder / "out/definition.py").exists():
        data = ("train", "test") if name == "vit" else ("train.csv", "test.jsonl")
        influence(
            "init", folder / "out", "--data", folder / data[0], "--query-data", folder / data[1]
        )
    result = influence("check", folder / "out", "--train", "0:4", "--queries", "0:2")
    assert result.code == 0, result.err
    own = [row for row in result.rows if row["check"] == "loss"]
    assert [row["split"] for row in own] == ["train", "query"]
    assert all("the model's own .loss" in row["note"] for row in own)


def test_the_definition_works_from_any_folder(runs, influence, monkeypatch, tmp_path):
    folder = runs("bert_pairs")
    expected = scores(influence, folder)
    monkeypatch.chdir(tmp_path)
    agree(scores(influence, Path(os.path.relpath(folder))), expected)


def test_a_model_in_bfloat16_says_what_it_computes_in(runs, influence):
    folder = runs("llama_bf16")
    scores(influence, folder)
    result = influence("score", folder / "out", "--queries", "0")
    assert "the checkpoints hold bfloat16, and model() computes in float32" in result.err
    assert (
        "computes in float32"
        not in influence("score", folder / "out", "--queries", "0", "--precision", "float32").err
    )


def test_the_true_fisher_matrix_of_a_language_model_needs_no_edit(runs, influence):
    folder = runs("gpt2_sharded")
    scores(influence, folder)
    flags = ("--method", "influence", "--queries", "0", "--fisher", "true")
    result = influence("score", folder / "out", *flags)
    assert result.code == 0, result.err
    assert "drawn from sample() of definition.py" in result.err
    again = influence("score", folder / "out", *flags, "--cache", "none", "--batch-size", "3")
    values = [[float(row["score"]) for row in rows] for rows in (result.rows, again.rows)]
    assert len(values[0]) > 8
    assert values[0] == pytest.approx(values[1], rel=1e-3, abs=1e-3 * max(map(abs, values[0])))


def test_words_are_those_of_the_embedding_that_token_ids_go_through(runs, influence):
    """BERT has three embeddings; the model names the one of tokens, and --embedding is not needed."""
    folder = runs("bert_pairs")
    scores(influence, folder)
    flags = ("--method", "tracin-we", "--queries", "0", "--top", "2")
    result = influence("score", folder / "out", *flags, "--by", "word")
    assert result.code == 0, result.err
    assert {row["word"] for row in result.rows} & set(hf_runs.WORDS)
    named = influence(
        "score",
        folder / "out",
        *flags,
        "--by",
        "word",
        "--embedding",
        "bert.embeddings.word_embeddings",
    )
    assert named.out == result.out


def test_a_model_saved_into_the_folder_itself_is_one_checkpoint(runs, influence, tmp_path):
    """As trainer.save_model(DIR) leaves it: no checkpoint-N, no step."""
    import shutil

    folder = runs("gpt2_sharded")
    place = tmp_path / "model"
    shutil.copytree(folder / "out/checkpoint-20", place)
    (place / "trainer_state.json").unlink()
    result = influence(
        "init", place, "--data", folder / "train.csv", "--query-data", folder / "test.jsonl"
    )
    assert result.code == 0, result.err
    result = influence("score", place, "--method", "grad-dot", "--top", "all")
    assert result.code == 0, result.err
    assert "holds one saved model and no checkpoint-N; influence reads it as step 1" in result.err
    scores(influence, folder)
    expected = influence("score", folder / "out", "--method", "grad-dot", "--top", "all")
    assert [row["score"] for row in result.rows] == [row["score"] for row in expected.rows]


@pytest.mark.parametrize("name", ["bert_pairs", "lora_bert"])
def test_python_has_the_scores_of_the_command_line(name, runs, influence):
    folder = runs(name)
    table = scores(influence, folder)
    matrix = open_run(folder / "out").score(top="all").matrix()
    assert torch.equal(torch.from_numpy(matrix), table)
