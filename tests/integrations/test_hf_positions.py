"""--by token and --by query-token of Hugging Face runs, from `init` to the table, with no edit in between."""

import csv
import json
from collections import defaultdict
from functools import cache

import pytest
import torch
from torch.nn import functional as F

from influence_cli import huggingface
from influence_cli.errors import DefinitionError
from tests import reference
from tests.integrations import hf_runs
from tests.position_runs import gradients_by_position

pytest.importorskip("transformers")
EXACT = ("--precision", "float64", "--queries", "0,2", "--top", "3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """runs(name) -> the folder of that run; made once."""
    return cache(lambda name: hf_runs.RUNS[name](tmp_path_factory.mktemp(name)))


@pytest.fixture
def split(runs, influence):
    """split(name, by) -> (query, train) -> part -> score, after a comparison of their sums with scores."""

    def call(name: str, by: str) -> dict[tuple[str, str], dict[str, float]]:
        folder = runs(name)
        data = ("--data", folder / "train.csv", "--query-data", folder / "test.jsonl")
        if not (folder / "out" / "definition.py").exists():
            assert influence("init", folder / "out", *data).code == 0
        complete = influence("score", folder / "out", *EXACT)
        result = influence("score", folder / "out", *EXACT, "--by", by)
        assert result.code == 0, result.err
        parts: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
        for row in result.rows:
            parts[row["query"], row["train"]][row[by]] = float(row["score"])
        for row in complete.rows:
            named = parts[row["query"], row["train"]]
            size = sum(map(abs, named.values()))
            assert sum(named.values()) == pytest.approx(float(row["score"]), abs=1e-8 * size)
        return parts

    return call


def test_parts_are_those_of_a_copy_of_the_weights_for_each_position(split, runs):
    """GPT-2: tied embeddings, and layers that fold positions into their batch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def loss(model, ids):
        logits = model(input_ids=ids, use_cache=False).logits
        targets = ids[:, 1:].flatten()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), targets, reduction="sum")[None]

    folder = runs("gpt2_sharded")
    rows = list(csv.DictReader((folder / "train.csv").open()))
    queries = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    (query, example), named = next(iter(split("gpt2_sharded", "token").items()))
    expected = torch.zeros(len(named), dtype=torch.float64)
    for step in (10, 20):
        place = folder / "out" / f"checkpoint-{step}"
        tokenizer = AutoTokenizer.from_pretrained(place)
        query_ids, ids = (
            tokenizer(row["text"], return_tensors="pt")["input_ids"]
            for row in (queries[int(query)], rows[int(example)])
        )
        models = [AutoModelForCausalLM.from_pretrained(place).double().eval() for _ in range(2)]
        grads = reference.gradients(models[0], loss, [query_ids])
        at, rest = gradients_by_position(models[1], loss, ids, ids.shape[1])
        assert not rest
        expected += 0.1 / step * sum((at[name] * grads[name]).flatten(1).sum(1) for name in at)
    scale = float(expected.abs().sum())
    assert list(named.values()) == pytest.approx(expected.tolist(), abs=1e-9 * scale)


@pytest.mark.parametrize("name", ["gpt2_sharded", "llama_bf16"])
def test_all_parameters_of_a_language_model_have_positions(name, split, runs):
    """Also layer norms, the position embedding of GPT-2, and Conv1D, which folds positions into its batch."""
    parts = split(name, "token")
    for named in parts.values():
        assert "-" not in named
        assert [key.split(":")[0] for key in named] == [str(s) for s in range(len(named))]
        assert {key.split(":")[1] for key in named} <= {*hf_runs.WORDS, *hf_runs.SPECIAL} - {
            "[PAD]"
        }


def test_the_parts_of_query_tokens_are_those_of_their_losses(split, runs):
    parts = split("gpt2_sharded", "query-token")
    for named in parts.values():
        assert named[next(iter(named))] == 0  # the first token is not predicted
        assert sum(value != 0 for value in named.values()) == len(named) - 1


def test_what_a_classifier_reads_from_one_position_has_no_position(split):
    parts = split("bert_pairs", "token")
    assert all(list(named)[-1] == "-" and named["-"] for named in parts.values())
    assert all("0:[CLS]" in named for named in parts.values())


def test_frozen_embeddings_still_name_the_tokens(split):
    parts = split("lora_bert", "token")
    assert all("0:[CLS]" in named for named in parts.values())


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    size = {
        "d_model": 8,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }
    size |= {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3, "bos_token_id": 2}
    config = BartConfig(vocab_size=26, init_std=0.3, forced_eos_token_id=None, **size, **ends)
    return BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("normalise", ["token", "example"])
@pytest.mark.parametrize("kind", ["causal-lm", "seq2seq-lm"])
def test_measures_of_tokens_sum_to_minus_the_loss(kind, normalise, tmp_path, runs):
    from transformers import AutoModelForCausalLM

    folder = runs("gpt2_sharded") / "out" / "checkpoint-20"
    model = (
        bart().double()
        if kind == "seq2seq-lm"
        else AutoModelForCausalLM.from_pretrained(folder).double()
    )
    if kind == "seq2seq-lm":
        model.save_pretrained(tmp_path)
        folder = tmp_path
    task = huggingface.Task(kind, folder, text=["text"], normalise=normalise)
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "labels": torch.tensor([[5, 6, 7, 8], [9, -100, 11, -100]]),
    }
    measures_BS = task.measure_tokens(model, batch)
    assert measures_BS.shape == (2, 4)
    assert torch.allclose(measures_BS.sum(1), -task.loss(model, batch))
    assert (measures_BS[1, [1, 3]] == 0).all()


def test_tokens_of_a_classifier_are_not_measured(runs):
    folder = runs("bert_pairs") / "out"
    task = huggingface.Task("sequence-classification", folder)
    with pytest.raises(DefinitionError, match="does not measure tokens of sequence-classification"):
        task.measure_tokens(None, {})


@pytest.mark.parametrize("target", ["cat sleeps", "a man plays music here"])
def test_positions_of_an_encoder_come_before_those_of_its_decoder(target, tmp_path, influence):
    """Also where both have one length."""
    model = bart()
    for step in (10, 20):
        model.save_pretrained(place := tmp_path / "out" / f"checkpoint-{step}")
        hf_runs.word_tokenizer(eos_token="[SEP]").save_pretrained(place)
        state = {"global_step": step, "log_history": [{"step": step, "learning_rate": 0.1}]}
        (place / "trainer_state.json").write_text(json.dumps(state))
    rows = [{"source": "the dog runs outside now", "target": target}] * 3
    for name in ("train", "test"):
        hf_runs.write_csv(tmp_path / f"{name}.csv", rows)
    data = ("--data", tmp_path / "train.csv", "--query-data", tmp_path / "test.csv")
    result = influence("init", tmp_path / "out", *data)
    assert result.code == 0, result.err
    flags = ("--precision", "float64", "--queries", "0", "--top", "1")
    complete = influence("score", tmp_path / "out", *flags).rows[0]
    source, words = ["the", "dog", "runs", "outside", "now"], target.split()
    source[-1] = "[UNK]"
    result = influence("score", tmp_path / "out", *flags, "--by", "token")
    decoded = ["[PAD]", *words[:-1]]  # each position reads the token before
    tokens = [row["token"] for row in result.rows]
    assert tokens == [f"{s}:{text}" for s, text in enumerate([*source, *decoded])]
    total = sum(float(row["score"]) for row in result.rows)
    assert total == pytest.approx(float(complete["score"]), rel=1e-9)
    result = influence("score", tmp_path / "out", *flags, "--by", "query-token")
    tokens = [row["query-token"] for row in result.rows]
    assert tokens == [f"{s}:{text}" for s, text in enumerate(words)]
    total = sum(float(row["score"]) for row in result.rows)
    assert total == pytest.approx(float(complete["score"]), rel=1e-9)
