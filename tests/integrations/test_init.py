"""What `influence init` guesses, says and refuses."""

import json

import pytest
from datasets import Dataset

from influence_cli.integrations.column_guess import choose_columns
from tests.integrations import hf_runs
from tests.refusals import refused

GUESSES = {
    "text and label": ("sequence-classification", {"text": "a", "label": 1}, "text: text; label: label"),
    "a pair": ("sequence-classification", {"premise": "a", "hypothesis": "b", "label": 1}, "text: premise, hypothesis; label: label"),
    "another case": ("sequence-classification", {"Sentence": "a", "Sentiment": "x"}, "text: Sentence; label: Sentiment"),
    "the longest text": ("sequence-classification", {"code": "ab", "story": "a long one", "category": "x"}, "text: story; label: category"),
    "an own id": ("sequence-classification", {"guid": "7", "text": "a", "label": 1}, "text: text; label: label; id: guid"),
    "prompt and completion": ("causal-lm", {"prompt": "a", "completion": "b"}, "text: prompt, completion"),
    "a chat": ("causal-lm", {"messages": [{"role": "user", "content": "a"}]}, "text: messages"),
    "a label is no part of a language model": ("causal-lm", {"text": "a", "label": 1}, "text: text"),
    "source and target": ("seq2seq-lm", {"document": "a", "summary": "b"}, "text: document, summary"),
    "words": ("token-classification", {"tokens": ["a"], "ner_tags": [1]}, "text: tokens; label: ner_tags"),
    "a picture": ("image-classification", {"image": b"", "label": 1}, "image: image; label: label"),
    "tokens": ("sequence-classification", {"input_ids": [1], "label": 1}, "label: label"),
}  # fmt: skip


@pytest.mark.parametrize("name", GUESSES)
def test_columns_are_guessed_by_their_names(name):
    kind, row, expected = GUESSES[name]
    assert str(choose_columns(kind, list(row), [row], (), None, None)) == expected


@pytest.fixture
def bert_folder(tmp_path):
    """out/checkpoint-10 with random weights, and no data."""
    from transformers import BertForSequenceClassification

    place = tmp_path / "out/checkpoint-10"
    BertForSequenceClassification(hf_runs.bert_config(num_labels=2)).save_pretrained(place)
    hf_runs.word_tokenizer(pair=True).save_pretrained(place)
    state = {"global_step": 10, "log_history": [{"step": 10, "learning_rate": 0.1}]}
    (place / "trainer_state.json").write_text(json.dumps(state))
    return tmp_path


def test_without_data_the_definition_runs_on_texts_of_its_own(bert_folder, influence):
    result = influence("init", bert_folder / "out")
    assert result.code == 0 and "CHANGE ROWS: data of your own" in result.err
    assert len(influence("score", bert_folder / "out", "--top", "all").rows) == 8


@pytest.mark.parametrize("kind", ["folder", "parquet", "tokenised"])
def test_data_of_datasets_and_parquet_is_read(kind, bert_folder, influence):
    rows = Dataset.from_list(
        [
            {"text": text, "label": i % 2, "id": f"row {i}"}
            for i, text in enumerate(hf_runs.sentences(6, 1))
        ]
    )
    path = bert_folder / "data"
    if kind == "tokenised":
        tokenizer = hf_runs.word_tokenizer(pair=True)
        rows = rows.map(lambda row: tokenizer(row["text"])).remove_columns("text")
    if kind == "parquet":
        path = bert_folder / "data.parquet"
        rows.to_parquet(path)
    else:
        rows.save_to_disk(path)
    result = influence("init", bert_folder / "out", "--data", path)
    assert result.code == 0, result.err
    assert "CHANGE query_data(): the training data" in result.err
    result = influence("score", bert_folder / "out", "--top", "all", "--queries", "0")
    assert result.code == 0, result.err
    assert {row["train_id"] for row in result.rows} == {f"row {i}" for i in range(6)}
    assert all(row["train_text"] for row in result.rows)


def test_class_names_that_no_file_orders_are_marked(bert_folder, influence):
    hf_runs.write_csv(
        bert_folder / "train.csv",
        [
            {"text": text, "label": ("pos", "neg")[i % 2]}
            for i, text in enumerate(hf_runs.sentences(6, 1))
        ],
    )
    result = influence("init", bert_folder / "out", "--data", bert_folder / "train.csv")
    assert (
        "CHANGE label_names: config.json does not name the classes; the order is a guess"
        in result.err
    )
    assert (
        'label_names=["neg", "pos"],  # CHANGE' in (bert_folder / "out/definition.py").read_text()
    )
    result = influence("score", bert_folder / "out", "--queries", "0")
    assert result.code == 0, result.err
    assert {row["train_label"] for row in result.rows} == {"pos", "neg"}


def test_text_label_and_id_override_the_guess(bert_folder, influence):
    hf_runs.write_csv(
        bert_folder / "train.csv",
        [
            {"text": "x", "other": text, "label": 0, "grade": i % 2, "key": i}
            for i, text in enumerate(hf_runs.sentences(6, 1))
        ],
    )
    flags = ("--text", "other", "--label", "grade", "--id", "key")
    result = influence("init", bert_folder / "out", "--data", bert_folder / "train.csv", *flags)
    assert "columns: text: other; label: grade; id: key" in result.err
    rows = influence("score", bert_folder / "out", "--queries", "0", "--top", "all").rows
    assert all(int(row["train_label"]) == int(row["train_id"]) % 2 for row in rows)


REFUSALS = {
    "a missing file": (["--data", "none.csv"], "--data none.csv: no such file"),
    "queries alone": (["--query-data", "train.csv"], "--query-data without --data"),
    "an unknown column": (["--data", "train.csv", "--text", "words"], "--text words: the data has no such column"),
    "more classes than the model has": (["--data", "train.csv", "--label", "name"], "column name has 3 labels, and the model has 2 classes"),
    "a template beside data": (["--data", "train.csv", "--template", "classifier"], "--template and --data"),
    "a picture for a text model": (["--data", "numbers.csv"], "no column of the data looks like text"),
    "a class that is not there": (["--model", "nomodule:Net"], "nomodule can't be imported"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_flags_that_do_not_fit_are_refused(name, bert_folder, influence, monkeypatch):
    monkeypatch.chdir(bert_folder)
    hf_runs.write_csv(
        bert_folder / "train.csv", [{"text": "x", "label": 0, "name": f"n{i}"} for i in range(3)]
    )
    hf_runs.write_csv(bert_folder / "numbers.csv", [{"label": 1}])
    flags, message = REFUSALS[name]
    result = influence("init", "out", *flags)
    refused(result, 1 if "--model" in flags else 2, message)
    assert not (bert_folder / "out/definition.py").exists()


def test_a_folder_without_a_model_says_what_init_knows(tmp_path, influence):
    hf_runs.write_csv(tmp_path / "train.csv", [{"text": "x", "label": 0}])
    refused(
        influence("init", tmp_path / "new", "--data", tmp_path / "train.csv"),
        2,
        "holds no model that init knows",
        "config.json",
    )
    assert not (tmp_path / "new").exists()


def test_a_model_without_a_template_is_named(tmp_path, influence):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5/config.json").write_text(
        json.dumps({"architectures": ["WhisperForAudioClassification"], "model_type": "whisper"})
    )
    refused(
        influence("init", tmp_path),
        2,
        "WhisperForAudioClassification has no template",
        "--template",
    )


def test_a_base_model_elsewhere_is_given_by_its_folder(tmp_path, influence):
    folder = hf_runs.lora_bert(tmp_path / "run")
    config = folder / "out/checkpoint-6/adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "somebody/model"})
    )
    data = ("--data", folder / "train.csv", "--query-data", folder / "test.jsonl")
    refused(
        influence("init", folder / "out", *data),
        1,
        "the base model somebody/model of checkpoint-6 is not on this machine",
        "--base DIR",
    )
    assert influence("init", folder / "out", *data, "--base", folder / "base").code == 0
    result = influence("score", folder / "out", "--queries", "0")
    assert result.code == 0, result.err


def test_pictures_in_parquet_are_read(tmp_path, influence):
    """As `datasets` writes them: a column of {"bytes": ..., "path": ...}."""
    folder = hf_runs.vit(tmp_path / "run")
    rows = [
        {"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label}
        for label, name in enumerate(("circle", "square"))
        for path in sorted((folder / "train" / name).glob("*.png"))
    ]
    Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    result = influence(
        "init", folder / "out", "--data", folder / "train.parquet", "--query-data", folder / "test"
    )
    assert result.code == 0, result.err
    packed = influence("score", folder / "out", "--top", "all", "--cache", "none")
    assert packed.code == 0, packed.err
    (folder / "out/definition.py").unlink()
    influence("init", folder / "out", "--data", folder / "train", "--query-data", folder / "test")
    plain = influence("score", folder / "out", "--top", "all", "--cache", "none")
    assert [row["score"] for row in packed.rows] == [row["score"] for row in plain.rows]
